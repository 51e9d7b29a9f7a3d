/** `<timeline-figure>`: recorded runs of the reference's batch manager; a row for each request, a column for each step. */

import { HUES, Picture, html, legend, svg } from "picture";
import { SteppedFigure, select } from "stepped_figure";
import { counted, listed } from "wording";

const DEFAULTS = { mode: "recompute", budget: "8", pool: "16" };
const MODES = { recompute: "recompute", swap: "swap to the host", none: "none: reserve for the longest" };
const LABEL = 58; // px, for the names of the rows
const [ROW, HEIGHT] = [34, 28]; // px, of a request
const POOL = 60; // px, the height of the chart of blocks
const LEGEND = {
  blue: "n: tokens of a prompt; •: decode",
  "blue rose": "n: computed again",
  free: "waits (×: preempted)",
  zone: "on the host (↓ out, ↑ in)",
};

class TimelineFigure extends SteppedFigure {
  #selects = {};
  #data = null;
  #row = null; // the selected request, or null for all

  get name() {
    return "A timeline; left and right arrow keys change the step, up and down choose a request";
  }

  get numSteps() {
    return 1 + this.#run.used.length;
  }

  get firstStep() {
    const places = Object.values(this.#run.cells).map((row) => row.findIndex(isPreemption));
    const preempted = places.filter((place) => place >= 0);
    return preempted.length ? 1 + Math.min(...preempted) : Math.min(8, this.numSteps - 1);
  }

  prepare(data) {
    this.#data = data;
    for (const run of Object.values(data.runs)) {
      run.cells = Object.fromEntries(Object.entries(run.rows).map(([name, row]) => [name, row.split(" ").map(parse)]));
    }
    const keys = Object.keys(data.runs).map((key) => key.split("/"));
    const values = (place, noun) =>
      Object.fromEntries(keys.map((key) => [key[place], `${key[place]} ${noun}`]));
    const change = () => this.show(this.step);
    this.#selects = {
      mode: select("Preemption", MODES, DEFAULTS.mode, change),
      budget: select("Tokens per step", values(1, "tokens"), DEFAULTS.budget, change),
      pool: select("Pool", values(2, "blocks"), DEFAULTS.pool, change),
    };
    this.addEventListener("keydown", (event) => this.#chooseRow(event));
  }

  ownControls() {
    return [Object.values(this.#selects)];
  }

  describe(step) {
    if (!step) return `${this.#total()} Choose a step, or press Play.`;
    return this.#row === null ? this.#sayStep(step) : `Step ${step}: ${this.#sayCell(this.#row, step)}.`;
  }

  reset() {
    for (const [name, value] of Object.entries(DEFAULTS)) this.#selects[name].querySelector("select").value = value;
    this.#row = null;
    super.reset();
  }

  /** The names of the rows stay in place while the columns scroll. */
  draw(step, width) {
    const column = Math.max(21, Math.min(30, Math.floor((width - LABEL - 8) / this.#run.used.length)));
    const scroll = html("div", { className: "scroll" }, this.#drawColumns(step, column));
    const before = this.querySelector(".scroll")?.scrollLeft ?? 0;
    queueMicrotask(() => {
      const right = step * column - scroll.clientWidth + column;
      scroll.scrollLeft = Math.max(right, Math.min(before, Math.max(0, step - 2) * column));
    });
    const key = new Picture();
    legend(key, 2, 16, LEGEND, Math.max(280, width - 10));
    return [html("div", { className: "sideways" }, this.#drawNames(), scroll), key.node("what the signs mean")];
  }

  #drawNames() {
    const picture = new Picture();
    const names = Object.keys(this.#run.cells);
    const bottom = 24 + names.length * ROW;
    names.forEach((name, row) => {
      const [, prompt, output] = this.#data.requests[name];
      picture.label(2, 38 + row * ROW, name, "name");
      picture.label(18, 38 + row * ROW, `${prompt}+${output}`, "note");
    });
    picture.label(2, bottom + 32, "blocks", "small");
    picture.label(2, bottom + 48, `of ${valueOf(this.#selects.pool)}`, "note");
    picture.label(2, bottom + POOL + 36, "tokens", "small");
    return picture.node("the requests, with the tokens of prompt and output");
  }

  #drawColumns(step, column) {
    const picture = new Picture();
    const { cells, used } = this.#run;
    const x = (index) => 2 + index * column;
    const names = Object.keys(cells);
    const bottom = 24 + names.length * ROW;
    const isLater = (index) => step > 0 && index >= step;
    if (step) {
      const marker = svg("rect", { x: x(step - 1) - 1, y: 16, width: column, height: bottom + POOL + 14, rx: 4 });
      picture.add(svg("g", { class: "zone" }, marker), 0, 0);
    }
    used.forEach((_, index) => picture.label(x(index) + column / 2 - 1, 12, `${index + 1}`, "note", "middle"));
    names.forEach((name, row) => {
      const y = 24 + row * ROW;
      cells[name].forEach((cell, index) => {
        if (cell.kind === "-") return;
        const [style, text] = lookOf(cell, HUES[row]);
        const marks = (isLater(index) ? " dim" : "") + (this.#row === name && index === step - 1 ? " lit" : "");
        const drawn = picture.cell(x(index), y, column - 2, HEIGHT, style + marks, text);
        this.#listen(drawn, name, index + 1);
      });
    });
    this.#drawPool(picture, x, column, bottom + 20, isLater);
    return picture.node("a timeline of the requests, and the blocks in use");
  }

  /** The blocks in use and the tokens computed in each step. */
  #drawPool(picture, x, column, y, isLater) {
    const { used } = this.#run;
    const capacity = Number(valueOf(this.#selects.pool));
    picture.line([x(0), y], [x(used.length) - 2, y]);
    picture.line([x(0), y + POOL], [x(used.length) - 2, y + POOL]);
    used.forEach((count, index) => {
      const height = (POOL * count) / capacity;
      const style = `${count === capacity ? "orange" : "teal"}${isLater(index) ? " dim" : ""}`;
      picture.cell(x(index) + 2, y + POOL - height, column - 6, height, style);
      picture.label(x(index) + column / 2 - 1, y + POOL + 16, `${this.#tokens(index)}`, "note", "middle");
    });
  }

  /** A cell says what happened while the pointer is on it; a click selects its step and request. */
  #listen(cell, name, step) {
    cell.append(svg("title", {}, `step ${step}: ${this.#sayCell(name, step)}`));
    cell.addEventListener("click", () => {
      this.#row = name;
      this.show(step);
    });
  }

  #chooseRow(event) {
    if (!["ArrowUp", "ArrowDown"].includes(event.key) || event.target.matches("input, select")) return;
    const rows = [null, ...Object.keys(this.#run.cells)];
    const move = event.key === "ArrowDown" ? 1 : rows.length - 1;
    this.#row = rows[(rows.indexOf(this.#row) + move) % rows.length];
    event.preventDefault();
    this.show(this.step);
  }

  #tokens(index) {
    return Object.values(this.#run.cells).reduce((sum, row) => sum + row[index].stop - row[index].start, 0);
  }

  /** What the whole run needed. */
  #total() {
    const all = Object.values(this.#run.cells).flat();
    const again = all.filter(({ kind }) => kind === "r").reduce((sum, { start, stop }) => sum + stop - start, 0);
    const moved = all.filter(({ kind }) => kind === "o").reduce((sum, { blocks }) => sum + blocks, 0);
    const cost = [
      counted(this.#run.used.length, "step"),
      counted(all.filter(isPreemption).length, "preemption"),
      `${counted(again, "token")} computed again`,
      `${counted(moved, "block")} swapped out`,
    ];
    return `The whole run: ${listed(cost)}.`;
  }

  #sayStep(step) {
    const cells = Object.entries(this.#run.cells).map(([name, row]) => [name, row[step - 1]]);
    const decoding = cells.filter(([, { kind }]) => kind === "d").map(([name]) => name);
    const waiting = cells.filter(([, { kind }]) => "wqh".includes(kind)).map(([name]) => name);
    const others = cells.filter(([, { kind }]) => !"dwqh-".includes(kind));
    const parts = [
      ...(decoding.length ? [`${listed(decoding)} decode${decoding.length > 1 ? "" : "s"}`] : []),
      ...others.map(([name]) => this.#sayCell(name, step)),
      ...(waiting.length ? [`${listed(waiting)} wait${waiting.length > 1 ? "" : "s"}`] : []),
    ];
    const ends = cells.filter(([, { isLast }]) => isLast).map(([name]) => name);
    if (ends.length) parts.push(`${listed(ends)} end${ends.length > 1 ? "" : "s"} after it`);
    const [budget, pool] = [valueOf(this.#selects.budget), valueOf(this.#selects.pool)];
    return `Step ${step}: ${parts.join("; ")}. The step computes ${this.#tokens(step - 1)} of at most `
      + `${budget} tokens, and ${this.#run.used[step - 1]} of ${pool} blocks are in use.`;
  }

  #sayCell(name, step) {
    const { kind, blocks, start, stop, lost } = this.#run.cells[name][step - 1];
    const [, prompt] = this.#data.requests[name];
    const count = counted(stop - start, "token");
    const says = {
      "-": "is not here: it has not arrived, or it has ended",
      w: "waits: too few slots or blocks are free for it",
      i: "is admitted, but the step's tokens are used up",
      d: "decodes 1 token",
      p: `computes ${count} of its prompt (${stop} of ${prompt})`,
      r: `computes ${count} again (${start} to ${stop - 1})`,
      x: `is preempted: its blocks are released, and ${counted(lost, "token")} must be computed again`,
      q: "waits, to be computed again",
      o: `is preempted: ${counted(blocks, "block")} are copied to the host`,
      h: "waits with its blocks on the host",
      s: `comes back: ${counted(blocks, "block")} are copied from the host, and it computes ${count}`,
    };
    return `${name} ${says[kind]}`;
  }

  get #run() {
    const { mode, budget, pool } = this.#selects;
    return this.#data.runs[`${valueOf(mode)}/${valueOf(budget)}/${valueOf(pool)}`];
  }
}

/** A cell as an object; see `Recorder` in `figures/timeline_frames.py` for the letters. */
function parse(text) {
  const kind = text[0];
  const numbers = text.slice(1).replace("!", "").split(",").map(Number);
  const cell = { kind, start: 0, stop: 0, blocks: 0, lost: 0, isLast: text.endsWith("!") };
  if ("pdr".includes(kind)) [cell.start, cell.stop] = numbers;
  if (kind === "s") [cell.blocks, cell.start, cell.stop] = numbers;
  if (kind === "o") [cell.blocks] = numbers;
  if (kind === "x") [cell.lost] = numbers;
  return cell;
}

/** Style and text of a cell. */
function lookOf({ kind, start, stop }, hue) {
  const looks = {
    w: ["free", ""],
    q: ["free", ""],
    x: ["free", "×"],
    h: ["zone", ""],
    o: ["zone", "↓"],
    i: [hue, ""],
    d: [hue, "•"],
    p: [hue, `${stop - start}`],
    r: [`${hue} rose`, `${stop - start}`],
    s: [hue, "↑"],
  };
  return looks[kind];
}

const isPreemption = ({ kind }) => kind === "x" || kind === "o";
const valueOf = (label) => label.querySelector("select").value;

customElements.define("timeline-figure", TimelineFigure);
