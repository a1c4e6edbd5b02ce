// A table that can be sorted, searched and grouped by module path. Only rows in view are in the
// document, so that thousands of them are quick; all are while the page is printed.
const ROW = 30; // Pixels, as page.css has it.
const SHORT = 8; // Rows of a table that needs no search.
const SPARE = 8; // Rows outside of the view on each side.
// Pixels of a column of each kind; the names take what is left.
const WIDTHS = { share: 168, count: 124, number: 112, difference: 124, heat: 78, text: 132 };

class TableView {
  constructor(place, table, onOpen) {
    this.table = table;
    this.onOpen = onOpen;
    this.rows = new Rows(table);
    this.isPrinting = false;
    this.said = make("p", { className: "said", role: "status" });
    this.body = make("tbody");
    this.heads = [];
    this.grid = make("table", { "aria-label": table.title }, this.head(), this.body);
    const sum = (columns) => columns.reduce((width, { kind }) => width + WIDTHS[kind], 0);
    this.grid.style.setProperty("--all", `${sum(table.columns)}px`);
    this.grid.style.setProperty("--major", `${sum(table.columns.filter((of) => !of.is_minor))}px`);
    this.box = make("div", { className: "box", tabIndex: 0, role: "region" }, this.grid);
    this.box.setAttribute("aria-label", `${table.title}, scrolls`);
    this.box.addEventListener("scroll", () => requestAnimationFrame(() => this.draw()));
    this.body.addEventListener("keydown", (event) => this.onKey(event));
    new ResizeObserver(() => this.draw()).observe(this.box);
    place.append(this.tools(), this.said, this.box);
    this.update();
  }

  tools() {
    const title = this.table.title.toLowerCase();
    const search = make("input", { type: "search", placeholder: "Search names" });
    search.setAttribute("aria-label", `Search ${title}`);
    search.addEventListener("input", () => {
      this.rows.terms = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      this.box.scrollTop = 0;
      this.update();
    });
    const isShort = !this.onOpen && this.table.names.length <= SHORT;
    return make("div", { className: "tools" }, isShort ? null : search, this.grouping(), this.choice());
  }

  grouping() {
    if (!this.rows.isGrouped) return null;
    const box = make("input", { type: "checkbox", checked: true });
    box.addEventListener("change", () => {
      this.rows.isGrouped = box.checked;
      this.update();
    });
    return make("label", {}, box, " Group by module");
  }

  choice() {
    if (this.table.frames.length < 2) return null;
    const select = make("select", { className: "choice" });
    this.table.frames.forEach((frame, index) =>
      select.append(make("option", { value: index, selected: index === this.rows.frame }, frame.label)),
    );
    select.addEventListener("change", () => {
      this.rows.frame = Number(select.value);
      this.update();
      document.dispatchEvent(new CustomEvent("amount", { detail: this.table.frames[this.rows.frame].label }));
    });
    return make("label", {}, "Amount ", select);
  }

  head() {
    const { columns } = this.table;
    const row = make("tr", { "aria-rowindex": 1 });
    [{ label: this.table.head, kind: "name" }, ...columns].forEach((column, index) => {
      const button = make("button", { type: "button" }, column.label);
      button.addEventListener("click", () => this.sortBy(index - 1));
      const cell = make("th", { scope: "col", className: classOf(column), title: column.label }, button);
      if (index) cell.style.width = `${WIDTHS[column.kind]}px`;
      this.heads.push(cell);
      row.append(cell);
    });
    return make("thead", {}, row);
  }

  // Numbers begin with the largest; the third time it is the order of the model again.
  sortBy(column) {
    const { sort } = this.rows;
    const first = column >= 0 && this.table.columns[column].kind !== "text";
    if (sort.column !== column) this.rows.sort = { column, falling: first };
    else if (sort.falling === first) this.rows.sort = { column, falling: !first };
    else this.rows.sort = { column: null, falling: false };
    this.update();
  }

  update() {
    const { column, falling } = this.rows.sort;
    this.heads.forEach((head, index) => {
      head.removeAttribute("aria-sort");
      if (index - 1 === column) head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    });
    this.visible = this.rows.visible();
    const all = this.table.names.length;
    const found = this.rows.matches;
    const part = found === all ? "" : `${counts.format(found)} of `;
    this.said.textContent = `${part}${counts.format(all)} ${all === 1 ? "row" : "rows"}`;
    this.grid.setAttribute("aria-rowcount", this.visible.length + 1);
    this.drawn = null;
    this.draw();
  }

  // Makes the rows in view, between two empty rows in place of the others.
  draw() {
    const count = this.visible.length;
    const above = this.isPrinting ? 0 : Math.floor(this.box.scrollTop / ROW) - SPARE;
    const first = Math.max(0, Math.min(above, count));
    const height = Math.max(this.box.clientHeight, ROW);
    const last = this.isPrinting ? count : Math.min(count, first + Math.ceil(height / ROW) + 2 * SPARE);
    if (this.drawn === `${first} ${last}`) return;
    this.drawn = `${first} ${last}`;
    const focused = this.body.contains(document.activeElement) ? this.focused : null;
    const made = this.visible.slice(first, last).map((row, index) => this.row(row, first + index));
    this.body.replaceChildren(spacer(first), ...made, spacer(count - last));
    if (focused !== null) (this.buttonAt(focused) ?? this.box).focus({ preventScroll: true });
  }

  row(row, index) {
    const none = row.below ? "" : null;
    const cells = this.table.columns.map((column, at) => cellOf(row.cells[at] ?? none, column));
    const name = make("th", { scope: "row", className: "name", title: row.name }, this.label(row, index));
    name.style.setProperty("--depth", row.depth);
    const made = make("tr", { "aria-rowindex": index + 2 }, name, ...cells);
    if (row.below) made.className = "group";
    return made;
  }

  label(row, index) {
    const text = row.label || "(empty)";
    if (!row.below && !this.onOpen) return make("span", {}, text);
    const button = make("button", { type: "button" }, text);
    button.dataset.row = index;
    button.addEventListener("focus", () => (this.focused = index));
    button.addEventListener("click", () => this.open(row, index));
    if (row.below) {
      button.setAttribute("aria-expanded", this.rows.isOpen(row));
      button.append(make("small", {}, ` ${counts.format(row.count)}`));
    }
    return button;
  }

  open(row, index) {
    if (!row.below) {
      this.onOpen(row.name, this.table.columns, row.cells);
      return;
    }
    this.rows.toggle(row);
    this.update();
    this.buttonAt(index)?.focus({ preventScroll: true });
  }

  buttonAt(index) {
    return this.body.querySelector(`button[data-row="${index}"]`);
  }

  onKey(event) {
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
    const row = this.visible[this.focused];
    const isSideways = event.key === "ArrowRight" || event.key === "ArrowLeft";
    if (isSideways && row?.below && this.rows.isOpen(row) === (event.key === "ArrowLeft")) {
      event.preventDefault();
      this.open(row, this.focused);
    } else if (event.key in moves) {
      event.preventDefault();
      this.moveTo(Math.max(0, Math.min(this.visible.length - 1, this.focused + moves[event.key])));
    }
  }

  moveTo(index) {
    const top = index * ROW;
    const room = this.box.clientHeight - this.grid.tHead.offsetHeight - ROW;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    if (top > this.box.scrollTop + room) this.box.scrollTop = top - room;
    this.draw();
    this.buttonAt(index)?.focus({ preventScroll: true });
  }

  // All rows, one below the other, with their whole names.
  print(isPrinting) {
    if (this.isPrinting === isPrinting) return;
    this.isPrinting = isPrinting;
    if (isPrinting) this.before = this.rows.isGrouped;
    this.rows.isGrouped = !isPrinting && this.before;
    this.update();
  }
}

const classOf = ({ kind, is_minor }) => `${kind}${is_minor ? " minor" : ""}`;

function spacer(rows) {
  const row = make("tr", { className: "spacer", "aria-hidden": "true" });
  row.style.height = `${rows * ROW}px`;
  return row;
}

function cellOf(cell, column) {
  const made = make("td", { className: classOf(column) }, make("span", {}, shown(cell, column.kind)));
  if (column.kind === "share" && typeof cell === "number") {
    const bar = make("i", { className: `bar hue${column.hue}` });
    bar.style.setProperty("--share", cell);
    made.append(bar);
  }
  if (column.kind === "heat" && typeof cell === "number") paint(made, cell);
  if (column.kind === "text" && cell) made.title = cell;
  return made;
}

// Small shares differ most, so the colour follows the square root.
function paint(element, share) {
  const depth = Math.sqrt(Math.max(0, Math.min(1, share)));
  element.style.background = heat(depth);
  // At this lightness black and white have the same contrast, 4.6.
  element.style.color = d3.lab(heat(depth)).l > 49.5 ? "#000" : "#fff";
}
