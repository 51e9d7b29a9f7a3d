/** The sequence whose block table is shown: the one pointed at, else the selected one, else the oldest running one. */

export class Focus {
  #pointed = null; // a sequence's id
  #block = null;

  /** onChange: called when the sequence or the block may have changed. */
  constructor(pool, labels, onChange) {
    this.pool = pool;
    this.labels = labels;
    this.onChange = onChange;
    /** The id of the selected sequence, or null. */
    this.chosen = null;
  }

  /** Forget the selected sequence and what is pointed at. */
  reset() {
    this.chosen = this.#pointed = this.#block = null;
  }

  /** The sequence to show, or null. */
  get sequence() {
    const { sequences } = this.pool;
    const first = [...sequences.values()].find(({ state }) => state === "running");
    return this.#ofBlock() ?? sequences.get(this.#pointed) ?? sequences.get(this.chosen) ?? first ?? null;
  }

  /** A description of the block that is pointed at, or "". */
  get detail() {
    const block = this.#block;
    if (block === null) return "";
    const state = this.pool.blocks.get(block);
    const holders = this.pool.holdersOf(block).map((one) => `${this.labels.of(one)} (${placeOf(one, block)})`);
    if (!state) return `Block ${block}: free`;
    const kept = state.kept ? ", in the prefix cache" : "";
    return `Block ${block}: ${holders.length ? `used by ${holders.join(", ")}` : "not in use"}${kept}`;
  }

  /** Note the id of the sequence that is pointed at, or null. */
  pointAt(id) {
    if (id === this.#pointed) return;
    this.#pointed = id;
    this.onChange();
  }

  /** Note the block that is pointed at, or null. */
  pointAtBlock(block) {
    if (block === this.#block) return;
    this.#block = block;
    this.onChange();
  }

  /** Select a sequence, so that its table stays in view; deselect it if it was selected. */
  choose(id) {
    this.chosen = this.chosen === id ? null : id;
    this.onChange();
  }

  /** Select a sequence that uses a block: the next one if one of them is selected, and none after the last. */
  chooseBlock(block) {
    const ids = this.pool.holdersOf(block).map(({ id }) => id);
    this.chosen = ids[ids.indexOf(this.chosen) + 1] ?? null;
    this.onChange();
  }

  #ofBlock() {
    if (this.#block === null) return undefined;
    const holders = this.pool.holdersOf(this.#block);
    return holders.find(({ id }) => id === this.chosen) ?? holders[0];
  }
}

function placeOf(sequence, block) {
  const table = sequence.tables.find(({ blocks }) => blocks.includes(block));
  return table ? `logical block ${table.first + table.blocks.indexOf(block)}` : "block table";
}
