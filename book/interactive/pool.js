/**
 * Blocks with reference counts, and block tables: the reference's `paged_attention.py` in JavaScript, with the same
 * order of allocation and the same errors. Plain bookkeeping; knows nothing of the page.
 */

/** @typedef {{src: number, dst: number, length: number}} BlockCopy the first `length` tokens of `src` go to `dst` */

export class OutOfBlocksError extends Error {}
export class DoubleFreeError extends Error {}
export class UnknownBlockError extends Error {}

/** Hands out the block ids 0 .. numBlocks - 1 from a queue of the free ones, and counts the holders of each block. */
export class BlockAllocator {
  #free;
  #refCounts;

  /** @param {number} numBlocks at least 1 */
  constructor(numBlocks) {
    this.numBlocks = numBlocks;
    this.#free = Array.from({ length: numBlocks }, (_, block) => block);
    this.#refCounts = new Array(numBlocks).fill(0);
  }

  /** The ids of the free blocks, the next to be allocated first. @returns {number[]} */
  get free() {
    return [...this.#free];
  }

  get numFree() {
    return this.#free.length;
  }

  /** The number of holders of a block; 0 if it is free. */
  refCount(block) {
    if (!(block >= 0 && block < this.numBlocks)) {
      throw new UnknownBlockError(`block ${block} is not in this pool of ${this.numBlocks} blocks`);
    }
    return this.#refCounts[block];
  }

  /** Take the first free block and return its id. Throws `OutOfBlocksError` if there is none. */
  allocate() {
    if (!this.#free.length) throw new OutOfBlocksError(`no free block: all ${this.numBlocks} are held`);
    const block = this.#free.shift();
    this.#refCounts[block] = 1;
    return block;
  }

  /** Count one more holder of a held block. */
  addRef(block) {
    this.#refCounts[block] = this.#numHolders(block) + 1;
  }

  /** Count one holder fewer; without a holder the block joins the end of the queue. */
  release(block) {
    this.#refCounts[block] = this.#numHolders(block) - 1;
    if (this.#refCounts[block] === 0) this.#free.push(block);
  }

  #numHolders(block) {
    const count = this.refCount(block);
    if (count === 0) throw new DoubleFreeError(`block ${block} is free: it has no holder`);
    return count;
  }
}

/** Maps a sequence's positions to blocks: token i is in `blocks[floor(i / blockSize)]`. */
export class BlockTable {
  constructor(allocator, blockSize) {
    this.allocator = allocator;
    this.blockSize = blockSize;
    /** @type {number[]} */
    this.blocks = [];
    this.numTokens = 0;
  }

  /** How many free blocks `append` would take, with the one for a copy on write. */
  blocksToAppend(numNewTokens) {
    const newBlocks = Math.ceil((this.numTokens + numNewTokens) / this.blockSize) - this.blocks.length;
    return newBlocks + (numNewTokens > 0 && this.#lastBlockIsShared() ? 1 : 0);
  }

  /**
   * Add places for new tokens at the end. All or nothing: throws `OutOfBlocksError` if too few blocks are free.
   * @returns {BlockCopy[]} the copy on write, if the last block is partly filled and has another holder
   */
  append(numNewTokens) {
    const needed = this.blocksToAppend(numNewTokens);
    const { numFree, numBlocks } = this.allocator;
    if (needed > numFree) {
      throw new OutOfBlocksError(`${numNewTokens} more tokens after ${this.numTokens} need ${needed} blocks of `
        + `${this.blockSize}; ${numFree} of ${numBlocks} are free`);
    }
    const copies = numNewTokens > 0 && this.#lastBlockIsShared() ? [this.#copyOnWrite()] : [];
    this.numTokens += numNewTokens;
    while (this.blocks.length * this.blockSize < this.numTokens) this.blocks.push(this.allocator.allocate());
    return copies;
  }

  /** Append a block of another holder: its first `length` tokens are this table's next ones. */
  shareBlock(block, length) {
    if (this.numTokens % this.blockSize || !(length >= 1 && length <= this.blockSize)) {
      throw new RangeError(`cannot append ${length} tokens of a shared block to ${this.numTokens} tokens`);
    }
    this.allocator.addRef(block);
    this.blocks.push(block);
    this.numTokens += length;
  }

  /** A second table with the same blocks, one more holder of each. */
  fork() {
    const child = new BlockTable(this.allocator, this.blockSize);
    child.blocks = [...this.blocks];
    child.numTokens = this.numTokens;
    for (const block of child.blocks) this.allocator.addRef(block);
    return child;
  }

  /** Drop this table's reference to each of its blocks, the last block first. */
  release() {
    while (this.blocks.length) this.allocator.release(this.blocks.pop());
    this.numTokens = 0;
  }

  #lastBlockIsShared() {
    return this.numTokens % this.blockSize !== 0 && this.allocator.refCount(this.blocks.at(-1)) > 1;
  }

  #copyOnWrite() {
    const src = this.blocks.at(-1);
    const dst = this.allocator.allocate();
    this.allocator.release(src);
    this.blocks[this.blocks.length - 1] = dst;
    return { src, dst, length: this.numTokens % this.blockSize };
  }
}
