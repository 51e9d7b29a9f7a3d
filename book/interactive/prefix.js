/**
 * The prefix cache: the reference's `prefix_cache.py` for full blocks in JavaScript, and requests that use it. Hashes
 * are short, so that they can be shown; tokens are words. Not of the page.
 */

import { BlockAllocator, BlockTable } from "pool";

const FNV_BASIS = 0x811c9dc5;
const FNV_PRIME = 0x01000193;

/** The parent of a prompt's first block. */
export const ROOT = 0;

/** FNV-1a over the parent's hash and the tokens, 32 bits. @param {number} parent @param {string[]} tokens */
export function blockHash(parent, tokens) {
  let hash = FNV_BASIS;
  for (const byte of new TextEncoder().encode([parent, ...tokens].join("\n"))) {
    hash = Math.imul(hash ^ byte, FNV_PRIME) >>> 0;
  }
  return hash;
}

/** The first 16 bits of a hash as 4 hexadecimal digits. */
export const shown = (hash) => (hash >>> 16).toString(16).padStart(4, "0");

/** The words and punctuation marks of a text, in lower case. */
export const tokenize = (text) => text.toLowerCase().match(/[\p{L}\p{N}']+|[^\s\p{L}\p{N}]/gu) ?? [];

/** @typedef {{tokens: string[], parent: number, hash: number}} TokenBlock a full block of a prompt */

/** The full blocks of a prompt. @returns {TokenBlock[]} */
export function cut(tokens, blockSize) {
  const blocks = [];
  for (let start = 0; start + blockSize <= tokens.length; start += blockSize) {
    const parent = blocks.at(-1)?.hash ?? ROOT;
    const own = tokens.slice(start, start + blockSize);
    blocks.push({ tokens: own, parent, hash: blockHash(parent, own) });
  }
  return blocks;
}

/** Keeps full blocks after their tables have released them; holds one reference to each. */
export class PrefixCache {
  #allocator;
  #kept = new Map(); // {block, tokens, parent, hash} by hash
  #queue = new Map(); // the idle ones, next to be evicted first
  #hashOf = new Map(); // by block

  constructor(allocator) {
    this.#allocator = allocator;
  }

  /** The ids of the idle blocks, the next to be evicted first. */
  get idle() {
    return [...this.#queue.values()].map(({ block }) => block);
  }

  /** What a block is kept for; undefined if it is not kept. @returns {TokenBlock | undefined} */
  keptAs(block) {
    return this.#kept.get(this.#hashOf.get(block));
  }

  /** The kept blocks that hold the first `stop` blocks of a prompt, up to the first miss. @returns {number[]} */
  match(stream, stop) {
    const found = [];
    for (const wanted of stream.slice(0, stop)) {
      const kept = this.#kept.get(wanted.hash);
      if (!kept || !isBlock(kept, wanted)) break;
      found.push(kept.block);
    }
    return found;
  }

  /** Append a kept block to a table of full blocks. */
  share(table, block) {
    table.shareBlock(block, table.blockSize);
    this.#queue.delete(this.#hashOf.get(block));
  }

  /** Keep the computed blocks `first` .. of a prompt; a block that is kept already replaces the table's own. */
  keep(table, stream, first) {
    for (let index = first; index < stream.length; index += 1) {
      const wanted = stream[index];
      const kept = this.#kept.get(wanted.hash);
      if (!kept) this.#add(table.blocks[index], wanted);
      else if (isBlock(kept, wanted)) this.#exchange(table, index, kept);
    }
  }

  /** Make idle the blocks that only the cache still holds, the table's last one first. */
  released(blocks) {
    for (const block of [...blocks].reverse()) {
      const hash = this.#hashOf.get(block);
      if (hash !== undefined && this.#allocator.refCount(block) === 1) this.#queue.set(hash, this.#kept.get(hash));
    }
  }

  /** Free up to `count` idle blocks from the front of the queue. @returns {number[]} their ids */
  evict(count) {
    const victims = [...this.#queue].slice(0, Math.max(0, count));
    for (const [hash, { block }] of victims) {
      this.#queue.delete(hash);
      this.#kept.delete(hash);
      this.#hashOf.delete(block);
      this.#allocator.release(block);
    }
    return victims.map(([, { block }]) => block);
  }

  #add(block, wanted) {
    this.#allocator.addRef(block);
    this.#kept.set(wanted.hash, { ...wanted, block });
    this.#hashOf.set(block, wanted.hash);
  }

  #exchange(table, index, { block, hash }) {
    this.#queue.delete(hash);
    this.#allocator.addRef(block);
    this.#allocator.release(table.blocks[index]);
    table.blocks[index] = block;
  }
}

const isBlock = (kept, wanted) => kept.parent === wanted.parent && kept.tokens.join("\n") === wanted.tokens.join("\n");

/**
 * What a prompt did, or why it could not start.
 * @typedef {{hits: number[], evicted: number[], taken: number[], exchanged: boolean, needed: number,
 *            available: number, started: boolean}} Submission
 */

/** Requests over one pool with a prefix cache. A request only has a prompt, which is computed when it is submitted. */
export class PrefixPool {
  constructor(numBlocks, blockSize) {
    this.blockSize = blockSize;
    this.allocator = new BlockAllocator(numBlocks);
    this.cache = new PrefixCache(this.allocator);
    /** The block tables by name. @type {Map<string, BlockTable>} */
    this.tables = new Map();
  }

  /** The kept blocks that a prompt would share. Its last token is always computed. @returns {number[]} */
  hits(tokens) {
    return this.cache.match(cut(tokens, this.blockSize), Math.floor((tokens.length - 1) / this.blockSize));
  }

  /** Share the kept blocks of a prompt's prefix, compute the rest, and keep its full blocks. @returns {Submission} */
  submit(name, tokens) {
    const table = new BlockTable(this.allocator, this.blockSize);
    const hits = this.hits(tokens);
    for (const block of hits) this.cache.share(table, block);
    const needed = Math.ceil(tokens.length / this.blockSize) - hits.length;
    const available = this.allocator.numFree + this.cache.idle.length;
    const result = { hits, needed, available, evicted: [], taken: [], exchanged: false, started: needed <= available };
    if (!result.started) {
      this.#release(table);
      return result;
    }
    result.evicted = this.cache.evict(needed - this.allocator.numFree);
    table.append(tokens.length - table.numTokens);
    result.taken = table.blocks.slice(hits.length);
    this.cache.keep(table, cut(tokens, this.blockSize), hits.length);
    result.exchanged = result.taken.some((block) => !table.blocks.includes(block));
    this.tables.set(name, table);
    return result;
  }

  /** End a request. @returns {number[]} the blocks that it held */
  finish(name) {
    const table = this.tables.get(name);
    const held = [...table.blocks];
    this.#release(table);
    this.tables.delete(name);
    return held;
  }

  #release(table) {
    const held = [...table.blocks];
    table.release();
    this.cache.released(held);
  }
}
