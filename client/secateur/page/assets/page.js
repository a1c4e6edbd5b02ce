// Builds the page from its data.
const data = JSON.parse(document.getElementById("data").textContent);
const panel = document.getElementById("details");
const views = [];

for (const chart of data.charts) CHARTS[chart.kind](document.getElementById("charts"), chart);

data.tables.forEach((table, index) => {
  const place = document.getElementById(`table-${index}`);
  const detailsOf = (name) => (Object.hasOwn(data.details, name) ? data.details[name] : []);
  const open = (name, columns, cells) => openDetails(panel, detailsOf(name), name, columns, cells);
  views.push(new TableView(place, table, index ? null : open));
});

addEventListener("beforeprint", () => views.forEach((view) => view.print(true)));
addEventListener("afterprint", () => views.forEach((view) => view.print(false)));

const theme = document.getElementById("theme");
theme.addEventListener("change", () => {
  document.documentElement.dataset.theme = theme.value;
});
