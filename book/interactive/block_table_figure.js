/** `<block-table-figure>`: sequences that append, fork and release, in a pool of eight blocks. */

import { OperationsFigure } from "operations_figure";
import { HUES, Picture, legend, slottedPool, slottedWidth, table } from "picture";
import { NAMES, Sequences } from "sequences";
import { button, enable, select } from "stepped_figure";
import { counted } from "wording";

const [NUM_BLOCKS, BLOCK_SIZE] = [8, 4];
const SIDE = 328; // px for the tables, if they are beside the pool
const ROW = 38; // px
const ID = 28; // px, the width of an id in a table

const STORY = [
  { kind: "start" },
  { kind: "append", name: "A", count: 6 },
  { kind: "fork", name: "A" },
  { kind: "append", name: "B", count: 1 },
  { kind: "append", name: "A", count: 1 },
  { kind: "append", name: "B", count: 4 },
  { kind: "fork", name: "B" },
  { kind: "release", name: "A" },
  { kind: "append", name: "C", count: 1 },
  { kind: "append", name: "B", count: 4 },
  { kind: "append", name: "C", count: 10 },
  { kind: "append", name: "C", count: 4 },
  { kind: "release", name: "B" },
  { kind: "append", name: "C", count: 4 },
  { kind: "release", name: "C" },
];

class BlockTableFigure extends OperationsFigure {
  #sequence = select("Sequence", Object.fromEntries(NAMES.map((name) => [name, name])), "B", () => this.update());
  #buttons = {
    one: button("Append 1", () => this.perform({ kind: "append", name: this.#name, count: 1 })),
    four: button("Append 4", () => this.perform({ kind: "append", name: this.#name, count: 4 })),
    fork: button("Fork", () => this.perform({ kind: "fork", name: this.#name })),
    release: button("Release", () => this.perform({ kind: "release", name: this.#name })),
    start: button("Start another", () => this.perform({ kind: "start" })),
  };

  get name() {
    return "Block tables and the pool; arrow keys change the step";
  }

  get story() {
    return STORY;
  }

  get firstStep() {
    return 3;
  }

  get opening() {
    return "All blocks are free, and the queue of free blocks has them in order.";
  }

  newModel() {
    return new Sequences(NUM_BLOCKS, BLOCK_SIZE);
  }

  apply(model, operation) {
    return model.apply(operation);
  }

  ownControls() {
    const { one, four, fork, release, start } = this.#buttons;
    return [[this.#sequence, one, four, fork, release, start]];
  }

  update() {
    const names = [...this.model.tables.keys()];
    const chosen = this.#sequence.querySelector("select");
    for (const option of chosen.options) option.disabled = !names.includes(option.value);
    if (!names.includes(chosen.value) && names.length) chosen.value = names.at(-1);
    const { one, four, fork, release, start } = this.#buttons;
    for (const each of [one, four, release]) enable(each, names.length > 0);
    enable(fork, names.length > 0 && names.length < NAMES.length);
    enable(start, names.length < NAMES.length);
  }

  draw(step, width) {
    const picture = new Picture();
    const { free } = this.model.allocator;
    const names = [...this.model.tables.keys()];
    const blocks = Array.from({ length: NUM_BLOCKS }, (_, block) => lookOf(this.model, block));
    const beside = width >= SIDE + 4 * (slottedWidth(BLOCK_SIZE) + 4);
    picture.label(2, 14, "free queue, next block first", "small");
    if (free.length) table(picture, 2, 22, "", "free", free, ID);
    else picture.label(12, 42, "empty", "small");
    names.forEach((name, row) => {
      const { blocks: ids, numTokens } = this.model.tables.get(name);
      const right = table(picture, 2, 66 + row * ROW, name, hue(name), ids, ID);
      picture.label(right + 6, 86 + row * ROW, counted(numTokens, "token"), "small");
    });
    const below = 66 + ROW * (beside ? NAMES.length : Math.max(2, names.length));
    const left = beside ? SIDE : 2;
    const top = beside ? 0 : below + 8;
    const columns = beside ? 4 : Math.max(1, Math.floor(width / (slottedWidth(BLOCK_SIZE) + 4)));
    picture.label(left, top + 14, `the pool: ${NUM_BLOCKS} blocks of ${BLOCK_SIZE} tokens each`, "small");
    const bottom = slottedPool(picture, left, top + 38, blocks, columns);
    const own = names.map((name) => [hue(name), `${name}'s`]);
    const shared = names.length > 1 ? { [`${own[0][0]} ${own[1][0]}`]: "shared" } : {};
    const entries = { ...Object.fromEntries(own), ...shared, free: "free" };
    legend(picture, left, bottom + 24, entries, left + (beside ? 460 : width));
    return [picture.node("block tables, the queue of free blocks, and the pool")];
  }

  get #name() {
    return this.#sequence.querySelector("select").value;
  }
}

const hue = (name) => HUES[NAMES.indexOf(name)];

function lookOf(model, block) {
  const holders = model.holders(block);
  if (!holders.length) return { slots: model.slots(block) };
  const copy = model.copies.find(({ dst }) => dst === block);
  const count = counted(holders.length, "ref");
  return {
    style: holders.map(hue).join(" ") + (model.changed.has(block) ? " lit" : ""),
    slots: model.slots(block),
    note: copy ? `${count}, copy of ${copy.src}` : count,
  };
}

customElements.define("block-table-figure", BlockTableFigure);
