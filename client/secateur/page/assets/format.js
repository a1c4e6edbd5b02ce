// Numbers as people read them, and short ways to make elements. Text is always set as text.
const counts = new Intl.NumberFormat("en");
const percent = (share) => `${(100 * share).toFixed(2)}%`;

function shown(cell, kind) {
  if (cell === null || cell === undefined) return "–";
  if (typeof cell === "string") return cell;
  if (kind === "share" || kind === "heat") return percent(cell);
  if (kind === "difference") return `${cell > 0 ? "+" : ""}${(100 * cell).toFixed(2)}`;
  if (kind === "count") return counts.format(cell);
  return String(Number(cell.toPrecision(6)));
}

// Makes an element; `of` has properties, and children that are strings become text.
function make(tag, of = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(of)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

// Bytes of a base64 text.
const bytesOf = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

const bitAt = (bytes, index) => (bytes[index >> 3] >> (index & 7)) & 1;
