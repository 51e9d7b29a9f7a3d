/**
 * The state of the pool, from the messages of `/live`: blocks, sequences and their block tables.
 *
 * Invariant: `blocks` has every block that is not free; `holdersOf(block)` are the sequences with the block in a table.
 */

/** @typedef {{holders: number, kept: boolean}} Block holders: number of tables; kept: it is in the prefix cache */

/**
 * The changes of a step, for drawing.
 * @typedef {{t: number, blocks: Set<number>, events: Array, tokens: number, admitted: object[],
 *            preempted: object[], ended: object[],
 *            copies: {from: number, to: number, holder: object}[]}} Change
 */

export class Pool {
  constructor() {
    this.numBlocks = 0;
    this.blockSize = 0;
    this.numTables = 1;
    this.numHostBlocks = 0;
    this.model = "";
    this.stats = null;
    /** @type {Map<number, Block>} */
    this.blocks = new Map();
    /** Active sequences by id, in order of arrival. @type {Map<string, object>} */
    this.sequences = new Map();
    /** One more than the highest block that has ever been in use. */
    this.reached = 0;
    this.holders = new Map();
  }

  /** Replace the state with that of a "pool" message. */
  reset(message) {
    Object.assign(this, new Pool());
    this.numBlocks = message.num_blocks;
    this.blockSize = message.block_size;
    this.numHostBlocks = message.num_host_blocks;
    this.model = message.model;
    this.stats = message.stats;
    for (const [block, holders, kept] of message.blocks) this.#set(block, { holders, kept });
    for (const sequence of message.sequences) this.#update(sequence, newChange(message.t));
  }

  /**
   * Apply one step.
   * @returns {Change}
   */
  step(step) {
    const change = { ...newChange(step.t), events: step.events };
    for (const [kind, block, holders] of step.events) {
      change.blocks.add(block);
      const kept = kind === "cached" || (kind !== "evicted" && (this.blocks.get(block)?.kept ?? false));
      this.#set(block, { holders, kept: kind === "freed" ? false : kept });
    }
    for (const sequence of step.sequences) this.#update(sequence, change);
    for (const [kind, to, , from] of step.events) {
      if (kind !== "copied") continue;
      const isHeld = (this.blocks.get(from)?.holders ?? 0) > 0;
      change.copies.push({ from, to, holder: this.holdersOf(to)[0], isHeld });
    }
    for (const id of step.ended) this.#end(id, change);
    this.stats = step.stats;
    return change;
  }

  /** The sequences with a block in one of their tables. */
  holdersOf(block) {
    return [...(this.holders.get(block) ?? [])].map((id) => this.sequences.get(id));
  }

  /** The number of blocks from `first` on that are not free. */
  numInUseFrom(first) {
    let count = 0;
    if (this.reached > first) for (const block of this.blocks.keys()) count += block >= first;
    return count;
  }

  #set(block, state) {
    if (state.holders || state.kept) this.blocks.set(block, state);
    else this.blocks.delete(block);
    this.reached = Math.max(this.reached, block + 1);
  }

  #update(update, change) {
    const before = this.sequences.get(update.id);
    const now = { preempted: false, ...before, ...update };
    now.tables = update.tables ?? before?.tables ?? [];
    this.numTables = Math.max(this.numTables, now.tables.length);
    if (update.tables) {
      this.#forget(update.id, before?.tables ?? [], change);
      this.#note(update.id, update.tables, change);
    }
    this.sequences.set(update.id, now);
    if (now.state === "running" && before?.state !== "running") {
      change.admitted.push({ ...now, wasPreempted: now.preempted });
      now.preempted = false;
    } else if (now.state === "waiting" && before?.state === "running") {
      now.preempted = true;
      change.preempted.push(now);
    }
    change.tokens += Math.max(0, now.outputs - (before?.outputs ?? 0));
  }

  #end(id, change) {
    const sequence = this.sequences.get(id);
    if (!sequence) return;
    this.#forget(id, sequence.tables, change);
    this.sequences.delete(id);
    change.ended.push(sequence);
  }

  #note(id, tables, change) {
    for (const { blocks } of tables) {
      for (const block of blocks) {
        if (!this.holders.has(block)) this.holders.set(block, new Set());
        this.holders.get(block).add(id);
        change.blocks.add(block);
      }
    }
  }

  #forget(id, tables, change) {
    for (const { blocks } of tables) {
      for (const block of blocks) {
        this.holders.get(block)?.delete(id);
        change.blocks.add(block);
      }
    }
  }
}

const newChange = (t) => ({
  ...{ t, blocks: new Set(), events: [], tokens: 0 },
  ...{ admitted: [], preempted: [], ended: [], copies: [] },
});
