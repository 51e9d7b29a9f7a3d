/** Whose block table is shown: who is pointed at, else who was chosen, else whoever has run longest. */

export class Focus {
  #pointed = null; // a sequence's id
  #block = null;

  /** onChange: called when somebody else is to be shown. */
  constructor(pool, labels, onChange) {
    this.pool = pool;
    this.labels = labels;
    this.onChange = onChange;
    /** The id of the sequence that was chosen, or null. */
    this.chosen = null;
  }

  /** Nobody is pointed at or chosen. */
  reset() {
    this.chosen = this.#pointed = this.#block = null;
  }

  /** The sequence that is shown, or null. */
  get sequence() {
    const { sequences } = this.pool;
    const first = [...sequences.values()].find(({ state }) => state === "running");
    return this.#ofBlock() ?? sequences.get(this.#pointed) ?? sequences.get(this.chosen) ?? first ?? null;
  }

  /** What there is to say of the block that is pointed at. */
  get detail() {
    const block = this.#block;
    if (block === null) return "";
    const state = this.pool.blocks.get(block);
    const holders = this.pool.holdersOf(block).map((one) => `${this.labels.of(one)} (its ${placeOf(one, block)})`);
    if (!state) return `Block ${block}: free`;
    const kept = state.kept ? ", in the prefix cache" : "";
    return `Block ${block}: ${holders.length ? `held by ${holders.join(", ")}` : "held by nobody"}${kept}`;
  }

  /** A sequence is pointed at; null: none is any more. */
  pointAt(id) {
    if (id === this.#pointed) return;
    this.#pointed = id;
    this.onChange();
  }

  /** A block is pointed at; null: none is any more. */
  pointAtBlock(block) {
    if (block === this.#block) return;
    this.#block = block;
    this.onChange();
  }

  /** Keep a sequence's table in sight, or no longer, where it was chosen already. */
  choose(id) {
    this.chosen = this.chosen === id ? null : id;
    this.onChange();
  }

  /** The same for who holds a block; where several do, the next of them. */
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
  return table ? `block ${table.first + table.blocks.indexOf(block)}` : "table";
}
