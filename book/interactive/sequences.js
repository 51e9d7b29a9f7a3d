/** Sequences in one pool, with the tokens that each block holds; says what each operation does. Not of the page. */

import { BlockAllocator, BlockTable } from "pool";
import { blocks, counted } from "wording";

/** The most sequences at once, and their names. */
export const NAMES = ["A", "B", "C", "D"];

export class Sequences {
  #contents; // the tokens in each block

  constructor(numBlocks, blockSize) {
    this.allocator = new BlockAllocator(numBlocks);
    this.blockSize = blockSize;
    /** The block tables by name. @type {Map<string, BlockTable>} */
    this.tables = new Map();
    /** The blocks that the last operation has allocated or written. @type {Set<number>} */
    this.changed = new Set();
    /** The copies of the last operation. */
    this.copies = [];
    this.#contents = Array.from({ length: numBlocks }, () => []);
  }

  /** Do an operation and say what happened. @param {{kind: string, name?: string, count?: number}} operation */
  apply({ kind, name, count }) {
    this.changed = new Set();
    this.copies = [];
    if (kind === "append") return this.#append(name, count);
    if (kind === "fork") return this.#fork(name);
    if (kind === "release") return this.#release(name);
    return this.#start();
  }

  /** The tokens in a block, one text for each place. */
  slots(block) {
    return Array.from({ length: this.blockSize }, (_, slot) => this.#contents[block][slot] ?? "");
  }

  /** The names of a block's holders. */
  holders(block) {
    return [...this.tables].filter(([, table]) => table.blocks.includes(block)).map(([name]) => name);
  }

  /** The first name that no sequence has; undefined if all are in use. */
  get freeName() {
    return NAMES.find((name) => !this.tables.has(name));
  }

  #start() {
    const name = this.freeName;
    this.#add(name, new BlockTable(this.allocator, this.blockSize));
    return `Sequence ${name} starts. Its table is empty: it takes a block with its first token.`;
  }

  #append(name, count) {
    const table = this.tables.get(name);
    const before = table.numTokens;
    const space = (this.blockSize - (before % this.blockSize)) % this.blockSize; // in its last block
    const free = this.allocator.numFree;
    const needed = table.blocksToAppend(count);
    if (needed > free) {
      return `${name} cannot append ${counted(count, "token")}: ${counted(needed, "free block")} needed, ${free} left. `
        + "Nothing has changed.";
    }
    const old = table.blocks.length;
    this.copies = table.append(count);
    for (const { src, dst, length } of this.copies) {
      this.#contents[dst] = this.#contents[src].slice(0, length);
      this.changed.add(dst);
    }
    for (let token = before; token < before + count; token += 1) {
      const block = table.blocks[Math.floor(token / this.blockSize)];
      this.#contents[block][token % this.blockSize] = `${name.toLowerCase()}${token}`;
      this.changed.add(block);
    }
    return [`${name} appends ${counted(count, "token")}.`, ...this.#whereTo(table, old, space)].join(" ");
  }

  #whereTo(table, old, space) {
    const taken = table.blocks.slice(old);
    const [copy] = this.copies;
    const sentences = [];
    if (copy) {
      sentences.push(`Block ${copy.src} is shared and has free places, so its ${counted(copy.length, "token")} `
        + `${copy.length > 1 ? "are" : "is"} copied to block ${copy.dst} first: copy on write.`);
    } else if (space) {
      sentences.push(`${taken.length ? "Its" : "It fits: its"} last block, ${table.blocks[old - 1]}, has `
        + `${counted(space, "free place")} and no other holder.`);
    }
    if (taken.length) {
      sentences.push(`${blocks(taken)} ${taken.length > 1 ? "come" : "comes"} from the front of the free queue.`);
    }
    return sentences;
  }

  #fork(name) {
    const child = this.freeName;
    const table = this.tables.get(name);
    this.#add(child, table.fork());
    return `${child} is a fork of ${name}: the same table of ${counted(table.blocks.length, "block")}, `
      + "one more reference to each. Nothing is copied.";
  }

  #release(name) {
    const table = this.tables.get(name);
    const held = [...table.blocks];
    table.release();
    this.tables.delete(name);
    const freed = held.filter((block) => this.allocator.refCount(block) === 0);
    const kept = held.filter((block) => !freed.includes(block));
    for (const block of freed) this.#contents[block] = [];
    const sentences = [`${name} releases its ${counted(held.length, "block")}.`];
    if (kept.length) sentences.push(`${blocks(kept)} ${kept.length > 1 ? "keep" : "keeps"} another holder.`);
    if (freed.length) {
      sentences.push(freed.length > 1
        ? `${blocks(freed)} have none left and join the end of the free queue, the table's last block first.`
        : `${blocks(freed)} has none left and joins the end of the free queue.`);
    }
    return sentences.join(" ");
  }

  /** The tables stay in the order of their names. */
  #add(name, table) {
    this.tables = new Map([...this.tables, [name, table]].sort(([a], [b]) => (a < b ? -1 : 1)));
  }
}
