// The zeros of a tensor as an image on a canvas: parts of it, each at several zooms.
const MOST_ZOOM = 16;

function drawPattern(place, images, name) {
  if (!images.length) return;
  const canvas = make("canvas", { role: "img" });
  const box = make("div", { className: "pattern", tabIndex: 0, role: "region" }, canvas);
  box.setAttribute("aria-label", `Pattern of ${name}, scrolls`);
  const said = make("span", { role: "status" });
  const state = { image: images[0], zoom: 1 };
  const least = () => Math.min(1, box.clientWidth / state.image.width || 1);
  const resize = () => {
    const { width, height, rows, columns } = state.image;
    canvas.style.width = `${width * state.zoom}px`;
    canvas.style.height = `${height * state.zoom}px`;
    const shownPart = `${counts.format(rows)} × ${counts.format(columns)} elements`;
    const pixel = width === columns && height === rows ? "a pixel is an element" : "a pixel is several elements";
    said.textContent = `${shownPart}, ${pixel}, zoom ${Number(state.zoom.toPrecision(2))}. Dark is kept, light is zero.`;
    canvas.setAttribute("aria-label", `Zeros of ${name}: ${said.textContent}`);
  };
  const zoom = (factor) => {
    state.zoom = Math.max(least(), Math.min(MOST_ZOOM, state.zoom * factor));
    resize();
  };
  const show = (image) => {
    paintPattern(canvas, image);
    state.image = image;
    const room = Math.min(320, box.clientWidth || 320) / Math.max(image.width, image.height);
    state.zoom = Math.min(MOST_ZOOM, room >= 1 ? Math.floor(room) : least());
    resize();
  };
  box.addEventListener("keydown", (event) => {
    if (event.key === "+" || event.key === "=") zoom(2);
    if (event.key === "-") zoom(0.5);
  });
  const tools = make("div", { className: "tools" }, partsOf(images, show), button("−", "Zoom out", () => zoom(0.5)));
  tools.append(button("+", "Zoom in", () => zoom(2)));
  place.append(make("h4", {}, "Pattern of zeros"), make("figure", {}, tools, box, make("figcaption", {}, said)));
  show(images[0]);
}

function button(label, title, onClick) {
  const made = make("button", { type: "button", title, "aria-label": title }, label);
  made.addEventListener("click", onClick);
  return made;
}

function partsOf(images, show) {
  if (images.length < 2) return null;
  const select = make("select", { "aria-label": "Part of the tensor" });
  images.forEach(({ rows, columns }, index) => {
    const part = `${counts.format(rows)} × ${counts.format(columns)}`;
    select.append(make("option", { value: index }, index ? `First ${part}` : `Whole: ${part}`));
  });
  select.addEventListener("change", () => show(images[Number(select.value)]));
  return select;
}

function paintPattern(canvas, image) {
  const { width, height } = image;
  const bytes = bytesOf(image.pixels);
  const alpha = image.isBits ? (index) => 255 * bitAt(bytes, index) : (index) => bytes[index];
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  for (let index = 0; index < width * height; index++) {
    pixels.data.set([24, 62, 120, alpha(index)], 4 * index);
  }
  context.putImageData(pixels, 0, 0);
}

// Slices along a dimension as a strip: a mark is a slice that is wholly zero.
function drawStrip(place, [dim, zeros, total, bits, count]) {
  const bytes = bytesOf(bits);
  const canvas = make("canvas", { className: "strip", width: Math.min(count, 1024), height: 1, role: "img" });
  const text = `Dimension ${dim}: ${counts.format(zeros)} of ${counts.format(total)} slices are wholly zero`;
  canvas.setAttribute("aria-label", text);
  const context = canvas.getContext("2d");
  context.fillStyle = "rgb(196, 86, 22)";
  for (let slice = 0; slice < count; slice++) {
    if (bitAt(bytes, slice)) context.fillRect(Math.floor((slice * canvas.width) / count), 0, 1, 1);
  }
  place.append(make("p", {}, `${text}.`), canvas);
}
