/**
 * Three ways to give requests memory: the longest length at once, adjacent blocks on demand, and any blocks by a block
 * table. Each serves the same requests, step by step. Not of the page.
 */

import { BlockAllocator, BlockTable } from "pool";
import { counted, listed } from "wording";

/** Tokens that a running request gains in a step. */
export const PACE = 2;

/**
 * A request: when it arrives, its prompt, and its length at its end, in tokens.
 * @typedef {{name: string, arrival: number, prompt: number, total: number}} Request
 */

/** The first block of the first run of `length` free blocks; null if there is none. @param {boolean[]} free */
export function firstRun(free, length) {
  let run = 0;
  for (let block = 0; block < free.length; block += 1) {
    run = free[block] ? run + 1 : 0;
    if (run === length) return block + 1 - length;
  }
  return null;
}

/** The length of the longest run of free blocks. @param {boolean[]} free */
export function longestRun(free) {
  let [run, longest] = [0, 0];
  for (const isFree of free) {
    run = isFree ? run + 1 : 0;
    longest = Math.max(longest, run);
  }
  return longest;
}

/** Memory in which a request's blocks are adjacent. */
class Regions {
  constructor(numBlocks, blockSize) {
    this.numBlocks = numBlocks;
    this.blockSize = blockSize;
    this.regions = new Map(); // block ids by the request's name
  }

  get free() {
    const held = new Set([...this.regions.values()].flat());
    return Array.from({ length: this.numBlocks }, (_, block) => !held.has(block));
  }

  blocksOf(name) {
    return this.regions.get(name) ?? [];
  }

  release(name) {
    this.regions.delete(name);
  }

  /** Take the first run of free blocks. @returns {boolean} whether there was one */
  take(name, length) {
    const start = firstRun(this.free, length);
    if (start === null) return false;
    this.regions.set(name, Array.from({ length }, (_, place) => start + place));
    return true;
  }

  blocksFor(tokens) {
    return Math.ceil(tokens / this.blockSize);
  }
}

/** Each request gets blocks for the longest length when it starts, and keeps them. */
export class Reserved extends Regions {
  constructor(numBlocks, blockSize, longest) {
    super(numBlocks, blockSize);
    this.longest = longest;
  }

  canServe({ total }) {
    return total <= this.longest;
  }

  start(name) {
    return this.take(name, this.blocksFor(this.longest));
  }

  /** Why a request cannot start. */
  lack() {
    return `${counted(this.blocksFor(this.longest), "adjacent block")} needed for the longest length`;
  }

  grow() {
    return { fits: true, copied: 0 };
  }
}

/** A request has as many blocks as its tokens need, side by side. If the next one is taken, it moves. */
export class Adjacent extends Regions {
  canServe() {
    return true;
  }

  start(name, tokens) {
    return this.take(name, this.blocksFor(tokens));
  }

  lack(tokens) {
    const needed = this.blocksFor(tokens);
    const free = this.free.filter(Boolean).length;
    return free >= needed
      ? `${free} blocks are free, but not ${needed} side by side`
      : `${counted(needed, "block")} needed, ${free} free`;
  }

  grow(name, tokens) {
    const own = this.blocksOf(name);
    const needed = this.blocksFor(tokens);
    if (needed === own.length) return { fits: true, copied: 0 };
    const more = Array.from({ length: needed - own.length }, (_, place) => own.at(-1) + 1 + place);
    if (more.every((block) => this.free[block])) {
      this.regions.set(name, [...own, ...more]);
      return { fits: true, copied: 0 };
    }
    this.regions.delete(name); // a run may overlap the old place
    if (this.take(name, needed)) return { fits: true, copied: own.length };
    this.regions.set(name, own);
    return { fits: false, copied: 0 };
  }
}

/** A request has as many blocks as its tokens need, anywhere: a block table finds them. */
export class Paged {
  constructor(numBlocks, blockSize) {
    this.numBlocks = numBlocks;
    this.blockSize = blockSize;
    this.allocator = new BlockAllocator(numBlocks);
    this.tables = new Map();
  }

  get free() {
    return Array.from({ length: this.numBlocks }, (_, block) => this.allocator.refCount(block) === 0);
  }

  blocksOf(name) {
    return this.tables.get(name)?.blocks ?? [];
  }

  canServe() {
    return true;
  }

  release(name) {
    this.tables.get(name).release();
    this.tables.delete(name);
  }

  start(name, tokens) {
    const table = new BlockTable(this.allocator, this.blockSize);
    if (table.blocksToAppend(tokens) > this.allocator.numFree) return false;
    table.append(tokens);
    this.tables.set(name, table);
    return true;
  }

  lack(tokens) {
    return `${counted(Math.ceil(tokens / this.blockSize), "block")} needed, ${this.allocator.numFree} free`;
  }

  grow(name, tokens) {
    const table = this.tables.get(name);
    const more = tokens - table.numTokens;
    const fits = table.blocksToAppend(more) <= this.allocator.numFree;
    if (fits) table.append(more);
    return { fits, copied: 0 };
  }
}

/** One memory and the requests in it: first come, first served; the youngest is preempted if memory runs out. */
export class Server {
  constructor(memory) {
    this.memory = memory;
    /** The tokens of each running request, oldest first. @type {Map<string, number>} */
    this.running = new Map();
    /** @type {{request: Request, tokens: number}[]} */
    this.waiting = [];
    this.finished = 0;
    this.refused = 0;
    /** Blocks copied because a request had to move. */
    this.copied = 0;
    /** What happened in the last step, in words. @type {string[]} */
    this.events = [];
    this.requests = new Map();
  }

  get isIdle() {
    return !this.running.size && !this.waiting.length;
  }

  /** Do one step: requests end, the running ones grow, and waiting ones start. @param {Request[]} arriving */
  step(arriving) {
    this.events = [];
    for (const request of arriving) this.#arrive(request);
    for (const [name, tokens] of [...this.running]) if (tokens === this.requests.get(name).total) this.#end(name);
    const moved = [];
    for (const name of [...this.running.keys()]) this.#grow(name, moved);
    this.#tell(moved);
    this.#admit();
  }

  #arrive(request) {
    this.requests.set(request.name, request);
    if (this.memory.canServe(request)) {
      this.waiting.push({ request, tokens: request.prompt });
    } else {
      this.refused += 1;
      this.events.push(`${request.name} is refused, because it is longer than allowed`);
    }
  }

  #end(name) {
    this.#stop(name);
    this.finished += 1;
    this.events.push(`${name} ends`);
  }

  /** Give a request its next tokens; note in `moved` if its blocks had to be copied. */
  #grow(name, moved) {
    while (this.running.has(name)) {
      const tokens = Math.min(this.running.get(name) + PACE, this.requests.get(name).total);
      const { fits, copied } = this.memory.grow(name, tokens);
      if (fits) {
        if (copied) moved.push({ name, copied });
        this.running.set(name, tokens);
        return;
      }
      this.#preempt([...this.running.keys()].at(-1));
    }
  }

  #tell(moved) {
    if (!moved.length) return;
    const total = moved.reduce((sum, { copied }) => sum + copied, 0);
    const who = listed(moved.map(({ name }) => name));
    this.events.push(moved.length > 1
      ? `${who} move to longer runs, ${counted(total, "block")} copied`
      : `${who} moves to a longer run, ${counted(total, "block")} copied`);
    this.copied += total;
  }

  #preempt(name) {
    const tokens = this.running.get(name);
    this.#stop(name);
    this.waiting.unshift({ request: this.requests.get(name), tokens });
    this.events.push(`${name} is preempted`);
  }

  #admit() {
    while (this.waiting.length) {
      const [{ request, tokens }] = this.waiting;
      if (!this.memory.start(request.name, tokens)) {
        this.events.push(`${request.name} waits: ${this.memory.lack(tokens)}`);
        return;
      }
      this.waiting.shift();
      this.running.set(request.name, tokens);
      this.events.push(`${request.name} starts${tokens > request.prompt ? " again" : ""}`);
    }
  }

  #stop(name) {
    this.memory.release(name);
    this.running.delete(name);
  }
}
