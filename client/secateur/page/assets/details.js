// What the page knows of one tensor, in the panel beside the table.
function openDetails(panel, details, name, columns, cells) {
  const breaks = name.split(".").flatMap((part, index) => (index ? [".", make("wbr"), part] : [part]));
  const title = make("h3", { tabIndex: -1 }, ...breaks);
  const facts = make("dl", { className: "facts" });
  columns.forEach((column, index) => {
    const value = shown(cells[index] ?? null, column.kind);
    if (value) facts.append(make("div", {}, make("dt", {}, column.label), make("dd", {}, value)));
  });
  const close = button("Close", "Close the details", () => {
    panel.hidden = true;
    panel.opener?.focus();
  });
  panel.opener = document.activeElement;
  panel.hidden = false;
  panel.replaceChildren(make("div", { className: "tools" }, title, close), facts);
  const parts = make("div", { className: "parts" });
  panel.append(parts);
  for (const [label] of details) {
    parts.append(make("section", {}, label ? make("h4", { className: "part" }, label) : null));
  }
  // Charts are as wide as their place, which all parts share.
  details.forEach(([label, found], index) => {
    drawTensor(parts.children[index], found, label ? `${name}, ${label}` : name);
  });
  title.focus({ preventScroll: true });
  panel.scrollIntoView({ block: "nearest" });
}

function drawTensor(place, found, name) {
  if (found.histogram) {
    place.append(make("h4", {}, "Magnitudes"));
    drawHistogram(place, found.histogram);
  }
  drawPattern(place, found.images ?? [], name);
  if (found.patterns?.length) {
    place.append(make("h4", {}, "N:M regularity"), regularity(found.patterns, "Groups of M with at most N that are not zero"));
  }
  if (found.blocks.length) {
    const shares = found.blocks.map(([side, zero, total]) => [`${side} × ${side}`, zero / total]);
    place.append(make("h4", {}, "Blocks"), regularity(shares, "Blocks that are wholly zero"));
  }
  if (found.slices?.length) place.append(make("h4", {}, "Zero slices"));
  for (const slices of found.slices ?? []) drawStrip(place, slices);
}

function regularity(shares, head) {
  const column = { kind: "share", hue: 0 };
  const rows = shares.map(([label, share]) =>
    make("tr", {}, make("th", { scope: "row" }, label), cellOf(share, column)),
  );
  const top = make("tr", {}, make("td"), make("th", { scope: "col" }, head));
  return make("table", { className: "small" }, make("thead", {}, top), make("tbody", {}, ...rows));
}
