/** The grid: one cell for each block. An update only touches the cells that have changed. */

const MAX_CELLS = 4096;
const MIN_CELLS = 96;
const FLASHES = new Set(["copied", "swapped_out", "swapped_in", "evicted", "shared", "allocated"]);
const FLASH_MS = 700;
const MAX_FLASHES = 128; // at once

export class Grid {
  #grid = document.querySelector("#grid");
  #more = document.querySelector("#more");
  #cells = [];
  #drawn = []; // what each cell shows, to skip cells that have not changed
  #columns = 16;
  #current = 0;
  #still = matchMedia("(prefers-reduced-motion: reduce)");

  /**
   * onPoint: called with the block under the pointer or with the focus, or null. onChoose: called with a block that
   * is clicked or selected by Enter. onLayout: called when cells may have moved.
   */
  constructor(pool, labels, { onPoint, onChoose, onLayout }) {
    this.pool = pool;
    this.labels = labels;
    this.onLayout = onLayout;
    const blockOf = (event) => event.target.closest?.("[data-block]")?.dataset.block ?? null;
    const number = (text) => (text === null ? null : Number(text));
    this.#grid.addEventListener("pointerover", (event) => onPoint(number(blockOf(event))));
    this.#grid.addEventListener("pointerleave", () => onPoint(null));
    this.#grid.addEventListener("focusin", (event) => onPoint(number(blockOf(event))));
    this.#grid.addEventListener("focusout", () => onPoint(null));
    this.#grid.addEventListener("click", (event) => {
      if (blockOf(event) === null) return;
      this.#go(number(blockOf(event)));
      onChoose(this.#current);
    });
    this.#grid.addEventListener("keydown", (event) => this.#key(event, onChoose));
    new ResizeObserver(() => this.#fit()).observe(this.#grid.parentElement);
  }

  /** The element of a block; undefined if it is not drawn. */
  cell(block) {
    return this.#cells[block];
  }

  /** Redraw all blocks. */
  reset() {
    if (this.#numCells() !== this.#cells.length) this.#build();
    else this.#cells.forEach((_, block) => this.#draw(block));
    this.#summarize();
  }

  /** Redraw blocks. flashes: the kind of the last event of each block that had one. */
  update(blocks, flashes) {
    if (this.#numCells() > this.#cells.length) this.#build();
    for (const block of blocks) if (block < this.#cells.length) this.#draw(block);
    this.#summarize();
    if (this.#still.matches) return;
    for (const [block, kind] of [...flashes].slice(-MAX_FLASHES)) {
      if (FLASHES.has(kind)) this.#flash(this.#cells[block], kind);
    }
  }

  /** Mark these blocks, and unmark all others. */
  mark(blocks) {
    for (const cell of this.#grid.querySelectorAll("[data-marked]")) delete cell.dataset.marked;
    for (const block of blocks) if (this.#cells[block]) this.#cells[block].dataset.marked = "";
  }

  #numCells() {
    const { numBlocks, reached } = this.pool;
    const rows = Math.ceil(Math.max(MIN_CELLS, reached) / this.#columns);
    return Math.min(numBlocks, MAX_CELLS, rows * this.#columns);
  }

  /** Use as many columns as fit: a power of two, so that rows start at round numbers. */
  #fit() {
    const width = this.#grid.parentElement.clientWidth;
    const widest = this.#numCells() > 256 ? 32 : 16;
    const columns = [32, 16, 8].find((count) => count <= widest && width >= 40 + 22 * count) ?? 8;
    if (columns !== this.#columns && this.pool.numBlocks) {
      this.#columns = columns;
      this.#build();
    }
    this.onLayout();
  }

  #build() {
    const hadFocus = this.#grid.contains(document.activeElement);
    const wanted = this.#numCells();
    this.#cells = Array.from({ length: wanted }, (_, block) => newCell(block));
    this.#drawn = [];
    const rows = [headRow(this.#columns)];
    for (let first = 0; first < wanted; first += this.#columns) {
      const row = newElement("div", { role: "row", className: "grid-row" });
      const head = newElement("span", { role: "rowheader", className: "row-head", textContent: `${first}` });
      row.append(head, ...this.#cells.slice(first, first + this.#columns));
      rows.push(row);
    }
    this.#grid.style.setProperty("--columns", this.#columns);
    this.#grid.dataset.size = wanted > 256 ? "small" : "normal";
    this.#grid.setAttribute("aria-rowcount", 1 + Math.ceil(this.pool.numBlocks / this.#columns));
    this.#grid.replaceChildren(...rows);
    for (let block = 0; block < wanted; block += 1) this.#draw(block);
    this.#current = Math.min(this.#current, Math.max(0, wanted - 1));
    if (this.#cells.length) this.#cells[this.#current].tabIndex = 0;
    if (hadFocus) this.#cells[this.#current]?.focus();
    this.#summarize();
    this.onLayout();
  }

  #draw(block) {
    const look = lookOf(block, this.pool, this.labels);
    const seen = `${look.className}|${look.text}|${look.label}|${look.stripes}`;
    if (this.#drawn[block] === seen) return;
    this.#drawn[block] = seen;
    const cell = this.#cells[block];
    cell.className = look.className;
    cell.textContent = look.text;
    cell.setAttribute("aria-label", look.label);
    if (look.stripes) cell.style.setProperty("--stripes", look.stripes);
  }

  #summarize() {
    const { numBlocks } = this.pool;
    const rest = numBlocks - this.#cells.length;
    const used = this.pool.numInUseFrom(this.#cells.length);
    const count = rest.toLocaleString("en");
    const text = used ? `and ${count} more blocks, ${used.toLocaleString("en")} of them in use`
      : `and ${count} more free blocks`;
    const summary = rest ? text : "";
    if (this.#more.textContent !== summary) this.#more.textContent = summary;
  }

  #flash(cell, kind) {
    const colour = `var(--flash-${kind})`;
    const frames = [{ boxShadow: `0 0 0 3px ${colour}` }, { boxShadow: `0 0 0 0 ${colour}` }];
    cell?.animate(frames, { duration: FLASH_MS, easing: "ease-out" });
  }

  #key(event, onChoose) {
    const last = this.#cells.length - 1;
    const start = this.#current - (this.#current % this.#columns);
    const steps = {
      ArrowRight: this.#current + 1,
      ArrowLeft: this.#current - 1,
      ArrowDown: this.#current + this.#columns,
      ArrowUp: this.#current - this.#columns,
      Home: event.ctrlKey ? 0 : start,
      End: event.ctrlKey ? last : Math.min(last, start + this.#columns - 1),
    };
    if (event.key === "Enter" || event.key === " ") onChoose(this.#current);
    else if (event.key in steps) this.#go(steps[event.key]);
    else return;
    event.preventDefault();
  }

  #go(block) {
    if (block < 0 || block >= this.#cells.length) return;
    this.#cells[this.#current].tabIndex = -1;
    this.#current = block;
    this.#cells[block].tabIndex = 0;
    this.#cells[block].focus();
  }
}

/** The look of a block, and its name, for example "block 17: requests A, B, shared by 2". */
export function lookOf(block, pool, labels) {
  const state = pool.blocks.get(block);
  if (!state) return { className: "cell free", text: "", label: `block ${block}: free` };
  if (!state.holders) {
    return { className: "cell cached", text: "", label: `block ${block}: cached, not in use` };
  }
  const holders = pool.holdersOf(block);
  const letters = [...new Set(holders.map((holder) => labels.letter(holder)))];
  const hues = [...new Set(holders.map((holder) => labels.hue(holder)))];
  const kept = state.kept ? " kept" : "";
  const also = state.kept ? ", in the prefix cache" : "";
  if (state.holders === 1) {
    const name = holders.length ? labels.of(holders[0]) : "?";
    return {
      className: `cell own h${hues[0] ?? 0}${kept}`,
      text: name,
      label: `block ${block}: request ${name}${also}`,
    };
  }
  const requests = `request${letters.length > 1 ? "s" : ""} ${letters.join(", ")}`;
  return {
    className: `cell shared${kept}`,
    text: `×${state.holders}`,
    label: `block ${block}: ${requests}, shared by ${state.holders}${also}`,
    stripes: stripesOf(hues),
  };
}

function stripesOf(hues) {
  const share = 100 / hues.length;
  const parts = hues.map((hue, i) => `var(--edge-${hue}) ${i * share}% ${(i + 1) * share}%`);
  return `linear-gradient(90deg, ${parts.join(", ")})`;
}

/** The heads of the columns: what each adds to the number at the head of a row. */
function headRow(columns) {
  const row = newElement("div", { role: "row", className: "grid-row column-heads" });
  const head = (_, column) => newElement("span", { role: "columnheader", textContent: `+${column}` });
  row.append(...Array.from({ length: columns }, head));
  return row;
}

function newCell(block) {
  const cell = newElement("span", { role: "gridcell", tabIndex: -1 });
  cell.dataset.block = block;
  return cell;
}

function newElement(name, properties) {
  const { role, ...others } = properties;
  const element = Object.assign(document.createElement(name), others);
  element.setAttribute("role", role);
  return element;
}
