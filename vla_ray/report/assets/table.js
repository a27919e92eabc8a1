// What every report page shares: making elements, writing numbers, and a table that stays quick with many rows.
// No knowledge of frames or maps here.
"use strict";

const Shared = (() => {
  // Elements --------------------------------------------------------------------------------------------------

  const byId = (id) => document.getElementById(id);

  // An element; data only ever arrives as text, never as markup.
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === false || value === null || value === undefined) continue;
      if (name === "text") element.textContent = value;
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children);
    return element;
  }

  function makeSvg(tag, attributes = {}, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  }

  // Numbers ---------------------------------------------------------------------------------------------------

  const MINUS = "\u2212";

  // Four significant digits, no exponent for everyday sizes; a dash for nothing. `whole`: 6 is a count, not a 6.000.
  function number(value, digits = 4, whole = true) {
    if (value === null || value === undefined) return "\u2013";
    if (value === 0) return "0";
    const size = Math.abs(value);
    let text;
    if (size >= 1e6 || size < 1e-4) text = value.toExponential(digits - 2);
    else if (whole && Number.isInteger(value)) text = value.toLocaleString("en-US");
    else text = value.toFixed(Math.max(0, Math.min(6, digits - 1 - Math.floor(Math.log10(size)))));
    return text.replace("-", MINUS);
  }

  // "(m/s^2)^2" reads better with superscripts.
  const unit = (text) => text.replace(/\^2/g, "\u00b2").replace(/\^3/g, "\u00b3");

  const withUnit = (value, name) => number(value) + (name ? "\u00a0" + unit(name) : "");

  // Table -----------------------------------------------------------------------------------------------------

  const ROW_PIXELS = 30;
  const SPARE_ROWS = 12; // drawn above and below what is visible

  // A sortable table that holds only the visible rows in the document.
  //   columns: [{ label, unit?, title?, kind?: "status" | "long" }]; rows: arrays of numbers, strings and null, one per column.
  //   onOpen(rowNumber): a row was clicked, or Enter was pressed on it.
  //   `order` holds the numbers of the rows as they are shown, sorted and filtered.
  class DataTable {
    constructor(host, { label, columns, rows, onOpen }) {
      this.host = host;
      this.columns = columns;
      this.rows = rows;
      this.onOpen = onOpen;
      this.onOrder = null; // to be called when rows were sorted or filtered
      this.sorted = { column: -1, down: false };
      this.match = () => true;
      this.current = null;
      this.numeric = columns.map((_, c) => !rows.some((r) => typeof r[c] === "string"));
      this.whole = columns.map((_, c) => rows.every((r) => r[c] === null || Number.isInteger(r[c])));
      this.order = rows.map((_, r) => r);
      this.build(label);
      this.refresh();
    }

    build(label) {
      this.body = make("tbody");
      this.headings = this.columns.map((column, c) => {
        const button = make("button", { type: "button", title: column.title || null }, column.label);
        if (column.unit) button.append(make("small", { text: unit(column.unit) }));
        button.addEventListener("click", () => this.sortBy(c));
        return make("th", { scope: "col", "data-column": column.label, class: this.numeric[c] ? "number" : null }, button);
      });
      const widths = this.columns.map((column, c) => make("col", { style: `width:${this.width(column, c)}ch` }));
      this.table = make(
        "table",
        { "aria-label": label, class: this.onOpen ? "opens" : null },
        make("colgroup", {}, ...widths),
        make("thead", {}, make("tr", {}, ...this.headings)),
        this.body,
      );
      const total = widths.reduce((sum, col) => sum + parseFloat(col.style.width), 0);
      this.table.style.minWidth = `${total}ch`;
      this.scroller = make("div", { class: "table-scroll", tabindex: "0", role: "region", "aria-label": label }, this.table);
      this.scroller.addEventListener("scroll", () => this.draw());
      new ResizeObserver(() => this.draw()).observe(this.scroller);
      this.body.addEventListener("click", (event) => this.open(event.target));
      this.body.addEventListener("keydown", (event) => {
        if (event.key === "Enter") this.open(event.target);
      });
      this.host.replaceChildren(this.scroller);
    }

    // In characters, from what the column holds: rows come and go, columns must not move.
    width(column, c) {
      const heading = column.label.length + (column.unit ? column.unit.length + 1 : 0);
      const longest = this.rows.reduce((most, row) => Math.max(most, this.text(row[c], c).length), 0);
      return Math.max(heading + 5, Math.min(longest, column.kind === "long" ? 110 : 40) + (this.numeric[c] ? 5.5 : 4));
    }

    text(value, c) {
      return typeof value === "string" ? value : number(value, 4, this.whole[c]);
    }

    sortBy(column) {
      const again = this.sorted.column === column;
      this.sorted = again && this.sorted.down ? { column: -1, down: false } : { column, down: again };
      this.refresh();
    }

    // Show the rows for which match(row, rowNumber) holds; returns how many.
    filter(match) {
      this.match = match;
      this.refresh();
      return this.order.length;
    }

    // Mark the row that is shown elsewhere, and bring it into view.
    select(row) {
      this.current = row;
      const top = this.order.indexOf(row) * ROW_PIXELS;
      const room = this.scroller.clientHeight - this.table.tHead.offsetHeight - ROW_PIXELS;
      const { scrollTop } = this.scroller;
      if (top >= 0 && room > 0 && (top < scrollTop || top > scrollTop + room)) {
        this.scroller.scrollTop = top < scrollTop ? top : top - room;
      }
      this.drawn = null;
      this.draw();
    }

    refresh() {
      const { column, down } = this.sorted;
      this.order = this.rows.map((_, r) => r).filter((r) => this.match(this.rows[r], r));
      if (column >= 0) {
        const sign = down ? -1 : 1;
        const missing = (value) => value === null || value === undefined;
        const compare = this.numeric[column]
          ? (a, b) => a - b
          : new Intl.Collator(undefined, { numeric: true }).compare;
        this.order.sort((a, b) => {
          const [x, y] = [this.rows[a][column], this.rows[b][column]];
          // Nothing goes last, whichever way the rest is sorted.
          if (missing(x) || missing(y)) return missing(x) - missing(y) || a - b;
          return sign * compare(x, y) || a - b;
        });
      }
      this.headings.forEach((heading, c) => {
        heading.setAttribute("aria-sort", c !== column ? "none" : down ? "descending" : "ascending");
      });
      this.table.setAttribute("aria-rowcount", this.order.length + 1);
      this.scroller.scrollTop = 0;
      this.drawn = null;
      this.draw();
      this.onOrder?.();
    }

    draw() {
      const first = Math.max(0, Math.floor(this.scroller.scrollTop / ROW_PIXELS) - SPARE_ROWS);
      const visible = Math.ceil(this.scroller.clientHeight / ROW_PIXELS) + 2 * SPARE_ROWS;
      const last = Math.min(this.order.length, first + visible);
      const key = `${first} ${last}`;
      if (key === this.drawn) return;
      this.drawn = key;
      const rows = this.order.slice(first, last).map((r, i) => this.row(r, first + i));
      this.body.replaceChildren(this.gap(first), ...rows, this.gap(this.order.length - last));
    }

    gap(rows) {
      return make("tr", { "aria-hidden": "true", class: "gap", style: `height:${rows * ROW_PIXELS}px` });
    }

    row(r, place) {
      const cells = this.columns.map((column, c) => {
        const value = this.rows[r][c];
        const text = this.text(value, c);
        if (column.kind === "status") return make("td", {}, make("span", { class: `status ${text}`, text }));
        return make("td", { class: this.numeric[c] ? "number" : null, title: text.length > 40 ? text : null, text });
      });
      const attributes = { "data-row": r, "aria-rowindex": place + 2, tabindex: this.onOpen ? "0" : null };
      return make("tr", { ...attributes, "aria-current": r === this.current ? "true" : null }, ...cells);
    }

    open(target) {
      const row = target.closest("tr[data-row]");
      if (row && this.onOpen) this.onOpen(Number(row.dataset.row));
    }
  }

  // A test for rows: all words occur somewhere in the row, whatever their case.
  function wordFilter(rows, query) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    return (_, r) => {
      if (!words.length) return true;
      const row = rows[r];
      row.searchable ??= row.filter((v) => v !== null && v !== undefined).join(" ").toLowerCase();
      return words.every((word) => row.searchable.includes(word));
    };
  }

  return { byId, make, makeSvg, number, unit, withUnit, DataTable, wordFilter };
})();
