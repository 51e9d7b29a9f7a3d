/** A sequence's block table: logical blocks above, physical blocks below, and arrows to the cells of the grid. */

const SVG = "http://www.w3.org/2000/svg";
const MAX_ARROWS = 160;

export class BlockTable {
  #strip = document.querySelector("#block-table");
  #arrows = document.querySelector("#arrows");
  #drawing = document.querySelector("#drawing");
  #scroll = document.querySelector("#scroll");
  #sequence = null;
  #seen = null;
  #width = 0;
  #block = null;

  constructor(labels, grid) {
    this.labels = labels;
    this.grid = grid;
    for (const element of [this.#strip, this.#scroll]) {
      element.addEventListener("scroll", () => this.layout(), { passive: true });
    }
    this.show(null);
    this.#strip.addEventListener("pointerover", ({ target }) => {
      this.point(target.closest("[data-to]")?.dataset.to ?? null);
    });
    this.#strip.addEventListener("pointerleave", () => this.point(null));
  }

  /** Show a sequence's table, or a hint if it is null. */
  show(sequence) {
    const seen = sequence
      ? `${sequence.id} ${this.labels.of(sequence)} ${sequence.state} ${sequence.host_blocks} `
        + sequence.tables.map((table) => `${table.first}:${table.blocks}`).join(" ")
      : "";
    if (seen === this.#seen) return;
    this.#seen = seen;
    this.#sequence = sequence;
    this.#strip.className = sequence ? `block-table h${this.labels.hue(sequence)}` : "block-table";
    this.#strip.replaceChildren(...(sequence ? this.#rows(sequence) : [emptyNote()]));
    this.#keepHeight();
    this.layout();
  }

  /** Keep the greatest height at this width, so that the grid below does not move. */
  #keepHeight() {
    if (this.#strip.offsetWidth !== this.#width) this.#strip.style.minHeight = "";
    this.#width = this.#strip.offsetWidth;
    this.#strip.style.minHeight = `${this.#strip.offsetHeight}px`;
  }

  /** Redraw the arrows, because cells or chips have moved. */
  layout() {
    for (const cell of document.querySelectorAll("[data-pointed]")) delete cell.dataset.pointed;
    const paths = this.#sequence ? this.#paths() : [];
    this.#arrows.replaceChildren(...paths);
    const hue = this.#sequence ? ` h${this.labels.hue(this.#sequence)}` : "";
    const isWrapped = this.#strip.clientHeight > 70; // in several rows: arrows cross chips
    this.#arrows.setAttribute("class", `arrows${hue}${isWrapped ? " many" : ""}`);
    this.point(this.#block);
  }

  #rows(sequence) {
    const name = this.labels.of(sequence);
    const held = sequence.tables.filter((table) => table.blocks.length);
    if (!held.length) return [note(`${name} uses no block of the pool${onHost(sequence)}.`)];
    return held.map((table, index) => {
      const row = element("div", "table-row");
      const which = held.length > 1 ? ` ${index + 1}` : "";
      const title = `Block table of ${name}${which}: logical blocks above, their blocks in the pool below`;
      const head = element("div", "table-head", title);
      const chips = element("ol", "chips");
      chips.append(...table.blocks.map((block, place) => chip(table.first + place, block)));
      row.append(head, chips);
      return row;
    });
  }

  #paths() {
    const box = this.#drawing.getBoundingClientRect();
    const strip = this.#strip.getBoundingClientRect();
    const view = this.#scroll.getBoundingClientRect();
    const chips = [...this.#strip.querySelectorAll("[data-to]")].slice(0, MAX_ARROWS);
    const pairs = [];
    for (const one of chips) {
      const cell = this.grid.cell(Number(one.dataset.to));
      if (!cell) continue;
      const [from, to] = [one.getBoundingClientRect(), cell.getBoundingClientRect()];
      const isSeen = from.bottom <= strip.bottom + 1 && to.top >= view.top - 1 && to.bottom <= view.bottom + 1;
      pairs.push({ cell, from, to, isSeen, block: one.dataset.to });
    }
    for (const { cell } of pairs) cell.dataset.pointed = "";
    return pairs.filter(({ isSeen }) => isSeen).map(({ from, to, block }) => {
      const path = document.createElementNS(SVG, "path");
      const [x, y] = [from.left + from.width / 2 - box.left, from.bottom - box.top];
      const [u, v] = [to.left + to.width / 2 - box.left, to.top - box.top + 1];
      const bend = Math.max(8, (v - y) / 2);
      path.setAttribute("d", `M${x} ${y}C${x} ${y + bend} ${u} ${v - bend} ${u} ${v}`);
      path.dataset.to = block;
      return path;
    });
  }

  /** Emphasize the arrow to a block; null: no arrow. */
  point(block) {
    this.#block = block === null ? null : `${block}`;
    for (const path of this.#arrows.children) path.classList.toggle("strong", path.dataset.to === this.#block);
  }
}

function chip(logical, physical) {
  const item = element("li", "chip");
  item.dataset.to = physical;
  item.title = `logical block ${logical} is block ${physical} in the pool`;
  const arrow = element("span", "hidden", "→");
  item.append(element("span", "logical", `${logical}`), arrow, element("span", "physical", `${physical}`));
  return item;
}

const onHost = (sequence) => (sequence.host_blocks ? `; ${sequence.host_blocks} are in host memory` : "");
const note = (text) => element("p", "hint", text);
const emptyNote = () => note("Point at a block, or select a request, to see its block table here.");

function element(name, className, text = "") {
  return Object.assign(document.createElement(name), { className, textContent: text });
}
