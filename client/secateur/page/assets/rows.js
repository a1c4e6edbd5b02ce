// The rows of a table: which ones are visible, in which order, grouped by module path.
const OPEN_ROWS = 1000; // Groups are open as deep as this many rows allow.

// Cells in their order: numbers, then texts, then nothing.
function ordered(a, b) {
  const kind = (cell) => (cell === null ? 2 : typeof cell === "string" ? 1 : 0);
  if (kind(a) !== kind(b)) return kind(a) - kind(b);
  if (typeof a === "number") return a - b;
  return a === null ? 0 : a.localeCompare(b, "en", { numeric: true });
}

class Rows {
  constructor(table) {
    this.table = table;
    this.lower = table.names.map((name) => name.toLowerCase());
    this.frame = table.chosen;
    this.isGrouped = table.is_grouped && table.names.length > 1;
    this.sort = { column: null, falling: false };
    this.terms = [];
    this.toggled = new Set();
    this.openDepth = this.isGrouped ? this.deepest() : 0;
  }

  get cells() {
    return this.table.frames[this.frame].rows;
  }

  // The rows that are not in a closed group: tensors, and groups of them.
  visible() {
    const found = [];
    this.lower.forEach((name, index) => {
      if (this.terms.every((term) => name.includes(term))) found.push(index);
    });
    this.matches = found.length;
    const leaves = found.map((index) => this.leaf(index, this.table.names[index]));
    if (!this.isGrouped) return this.inOrder(leaves);
    const rows = [];
    this.walk(this.summed(this.tree(found), ""), 0, rows);
    return rows;
  }

  // The depth of the groups that are open at first.
  deepest() {
    const all = this.summed(this.tree(this.table.names.keys()), "");
    let rows = all.below;
    for (let depth = 0, sum = rows.length; ; depth++) {
      rows = rows.flatMap((row) => row.below ?? []);
      sum += rows.length;
      if (!rows.length || sum > OPEN_ROWS) return depth;
    }
  }

  leaf(index, label, depth = 0) {
    return { name: this.table.names[index], label, depth, index, cells: this.cells[index] };
  }

  tree(indices) {
    const root = { children: new Map() };
    for (const index of indices) {
      const parts = this.table.names[index].split(".");
      let node = root;
      for (const part of parts.slice(0, -1)) {
        if (!node.children.has(part)) node.children.set(part, { children: new Map() });
        node = node.children.get(part);
      }
      // A tensor may have the name of a module, and Map keeps the order of the model.
      node.children.set(`${parts.at(-1)}\0`, { index, label: parts.at(-1) });
    }
    return root;
  }

  // Adds up the tensors of each group; a group of one group becomes a part of its label.
  summed(node, path) {
    node.below = [];
    for (let [label, child] of node.children) {
      if (child.index !== undefined) {
        node.below.push(this.leaf(child.index, child.label));
        continue;
      }
      let name = path ? `${path}.${label}` : label;
      while (child.children.size === 1) {
        const [[inner, only]] = child.children;
        if (only.index !== undefined) break;
        [label, name, child] = [`${label}.${inner}`, `${name}.${inner}`, only];
      }
      this.summed(child, name);
      node.below.push(child.below.length > 1 ? { ...child, label, name } : this.lifted(child, label));
    }
    node.count = 0;
    for (const below of node.below) node.count += below.count ?? 1;
    const sums = this.table.columns.map((_, column) =>
      node.below.reduce((sum, below) => sum + Number((below.sums ?? below.cells)[column] || 0), 0),
    );
    node.sums = sums;
    node.cells = this.table.columns.map(({ group }, column) => {
      if (group === "sum") return sums[column];
      return group && sums[group[1]] ? sums[group[0]] / sums[group[1]] : null;
    });
    return node;
  }

  // A module with one tensor needs no row of its own.
  lifted(module, label) {
    const [only] = module.below;
    return { ...only, label: `${label}.${only.label}` };
  }

  walk(node, depth, rows) {
    for (const child of this.inOrder(node.below)) {
      rows.push(Object.assign(child, { depth }));
      if (child.below && this.isOpen(child)) this.walk(child, depth + 1, rows);
    }
  }

  isOpen(group) {
    return this.terms.length > 0 || group.depth < this.openDepth !== this.toggled.has(group.name);
  }

  toggle(group) {
    if (!this.toggled.delete(group.name)) this.toggled.add(group.name);
  }

  inOrder(rows) {
    const { column, falling } = this.sort;
    if (column === null) return rows;
    const cell = (row) => (column < 0 ? row.label : row.cells[column]);
    const sign = falling ? -1 : 1;
    return [...rows].sort((a, b) => {
      const [x, y] = [cell(a), cell(b)];
      return x === null || y === null ? ordered(x, y) : sign * ordered(x, y);
    });
  }
}
