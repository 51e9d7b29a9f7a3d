/** `<prefix-cache-figure>`: prompts over a small pool whose full blocks are cached by a chain of hashes. */

import { OperationsFigure } from "operations_figure";
import { GAP, Picture, grid, html, legend, svg } from "picture";
import { PrefixPool, cut, shown, tokenize } from "prefix";
import { button, enable, select } from "stepped_figure";
import { blocks, counted, listed } from "wording";

const CAPACITY = 32; // tokens in the pool
const NAMES = ["A", "B", "C", "D"];
const HUES = ["blue", "orange", "violet", "teal"]; // green is for hits
const SIZES = { 2: "2 tokens", 4: "4 tokens", 8: "8 tokens" };
const VERDICT = 92; // px, the width of a block's hash and verdict
const WIDE = 62; // px, the width of a block in the pool

const SYSTEM = "You are a helpful assistant. Explain what";
const STORY = [
  { kind: "submit", prompt: `${SYSTEM} a KV cache is.` },
  { kind: "submit", prompt: `${SYSTEM} a block table is, please.` },
  { kind: "finish", name: "A" },
  { kind: "finish", name: "B" },
  { kind: "submit", prompt: `${SYSTEM} a KV cache is, in one sentence.` },
  { kind: "submit", prompt: "Translate into French: the cat sat on the mat." },
  { kind: "finish", name: "A" },
  { kind: "submit", prompt: "You are a rude assistant. Explain what a KV cache is." },
  { kind: "finish", name: "B" },
  { kind: "submit", prompt: "You are a rude assistant. Explain what" },
];

class PrefixCacheFigure extends OperationsFigure {
  #prompt = html("input", { type: "text", spellcheck: false, autocomplete: "off" });
  #size = select("Block size", SIZES, "4", () => this.rebuild());
  #running = select("Request", Object.fromEntries(NAMES.map((name) => [name, name])), "A", () => {});
  #submit = button("Submit", () => this.#submitPrompt());
  #finish = button("Finish", () => this.perform({ kind: "finish", name: valueOf(this.#running) }));
  #evict = button("Evict one", () => this.perform({ kind: "evict" }));

  get name() {
    return "A prompt's blocks and the pool with its prefix cache; arrow keys change the step";
  }

  get story() {
    return STORY;
  }

  get firstStep() {
    return 1;
  }

  get opening() {
    return "Nothing is cached yet: every block of the prompt is a miss.";
  }

  newModel() {
    const size = Number(valueOf(this.#size));
    return new PrefixPool(CAPACITY / size, size);
  }

  apply(model, operation) {
    if (operation.kind === "submit") return submit(model, operation.prompt);
    if (operation.kind === "finish") return finish(model, operation.name);
    const [block] = model.cache.evict(1);
    return block === undefined
      ? "No block is idle, so none can be evicted: a block in a table is never evicted."
      : `Block ${block} is evicted: it was idle for the longest time. It is free and its content is forgotten.`;
  }

  ownControls() {
    this.#prompt.addEventListener("input", () => this.redraw());
    this.#prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.#submitPrompt();
    });
    const prompt = html("label", { className: "wide" }, "Prompt", this.#prompt);
    return [[prompt, this.#submit], [this.#running, this.#finish, this.#evict, this.#size]];
  }

  /** The prompt of the next step is in the field, so that its hits can be predicted, or that of this step. */
  update() {
    const { prompt } = [this.nextOperation, this.lastOperation].find((one) => one?.kind === "submit") ?? {};
    if (prompt !== undefined) this.#prompt.value = prompt;
    const names = [...this.model.tables.keys()];
    const chosen = this.#running.querySelector("select");
    for (const option of chosen.options) option.disabled = !names.includes(option.value);
    if (!names.includes(chosen.value) && names.length) chosen.value = names[0];
    enable(this.#finish, names.length > 0);
    enable(this.#submit, names.length < NAMES.length);
    enable(this.#evict, this.model.cache.idle.length > 0);
  }

  draw(step, width) {
    const picture = new Picture();
    const bottom = this.#drawPrompt(picture);
    const { numBlocks } = this.model.allocator;
    picture.label(2, bottom + 18, `the pool: ${numBlocks} blocks, hashes of cached ones`, "small");
    const columns = Math.max(1, Math.min(8, Math.floor(width / (WIDE + GAP))));
    const ids = Array.from({ length: numBlocks }, (_, block) => block);
    const below = grid(2, bottom + 42, ids, columns, WIDE, 50, (x, y, block) => {
      picture.label(x + WIDE / 2, y - 6, `${block}`, "note", "middle");
      const cell = picture.cell(x, y, WIDE, 50, ...look(this.model, block));
      const kept = this.model.cache.keptAs(block);
      if (kept) cell.append(svg("title", {}, `block ${block}: ${kept.tokens.join(" ")}`));
    });
    const own = [...this.model.tables.keys()].map((name) => [hue(name), `held by ${name}`]);
    const entries = { ...Object.fromEntries(own), panel: "cached, idle", free: "free" };
    legend(picture, 2, below + 26, entries, Math.max(width, 280));
    return [picture.node("the prompt's blocks with their hashes, and the pool")];
  }

  /** One row for each block of the prompt in the field: its hash, whether it is cached, and its tokens. */
  #drawPrompt(picture) {
    const tokens = tokenize(this.#prompt.value);
    const size = Number(valueOf(this.#size));
    const hits = this.model.hits(tokens);
    picture.label(2, 14, `the prompt above: ${counted(tokens.length, "token")}, ${hits.length * size} cached`, "small");
    const full = cut(tokens, size);
    for (let row = 0; row * size < tokens.length; row += 1) {
      const y = 24 + row * 44;
      const [style, note] = verdict(row, full, hits, this.model.cache);
      picture.cell(2, y, VERDICT, 36, style, full[row] ? shown(full[row].hash) : "-", note);
      if (row > 0) picture.line([2 + VERDICT / 2, y - 8], [2 + VERDICT / 2, y], "arrow");
      let x = 2 + VERDICT + 8;
      for (const token of tokens.slice(row * size, (row + 1) * size)) {
        const width = 7.2 * token.length + 10;
        picture.cell(x, y + 5, width, 26, style, token);
        x += width + 2;
      }
    }
    return 24 + Math.max(1, Math.ceil(tokens.length / size)) * 44;
  }

  #submitPrompt() {
    const prompt = this.#prompt.value;
    if (this.model.tables.size === NAMES.length) this.say("Four requests run: finish one first.");
    else if (tokenize(prompt).length) this.perform({ kind: "submit", prompt });
    else this.say("Type a prompt first.");
  }
}

const valueOf = (label) => label.querySelector("select").value;
const hue = (name) => HUES[NAMES.indexOf(name)];

/** The style of a prompt's block and what is said about it. */
function verdict(index, full, hits, cache) {
  if (index < hits.length) return ["green", `hit: block ${hits[index]}`];
  if (!full[index]) return ["free", "not full"];
  const isKept = cache.match(full, index + 1).length > index; // but it has the last token
  return ["panel", isKept ? "last: computed" : "miss"];
}

/** Style, text and note of a block in the pool. */
function look({ cache, allocator, tables }, block) {
  const refs = allocator.refCount(block);
  if (!refs) return ["free"];
  const kept = cache.keptAs(block);
  const text = kept ? shown(kept.hash) : "not full";
  const holders = [...tables].filter(([, table]) => table.blocks.includes(block)).map(([name]) => name);
  const place = cache.idle.indexOf(block);
  if (!holders.length) return ["panel", text, place === 0 ? "evict next" : `idle, #${place + 1}`];
  return [holders.map(hue).join(" "), text, counted(refs, "ref")];
}

function submit(model, prompt) {
  const name = NAMES.find((one) => !model.tables.has(one));
  const tokens = tokenize(prompt);
  const { hits, needed, available, evicted, taken, exchanged, started } = model.submit(name, tokens);
  if (!started) {
    return `${name} cannot start: it needs ${counted(needed, "more block")}, and ${available} are free or idle. `
      + "It waits until another request ends.";
  }
  const cached = hits.length * model.blockSize;
  const computed = tokens.length - cached;
  const sentences = [hits.length
    ? `${name} shares block${hits.length > 1 ? "s" : ""} ${listed(hits)}: ${cached} of its ${tokens.length} tokens `
      + `are cached, ${computed} ${computed > 1 ? "are" : "is"} computed.`
    : `${name} finds nothing in the cache: all ${tokens.length} tokens are computed.`];
  if (evicted.length) {
    sentences.push(`${blocks(evicted)} ${evicted.length > 1 ? "were" : "was"} idle and `
      + `${evicted.length > 1 ? "are" : "is"} evicted for it.`);
  }
  sentences.push(exchanged
    ? "Its last block was cached, but the last token must be computed; then the table takes the cached block."
    : `It takes block${taken.length > 1 ? "s" : ""} ${listed(taken)}, and its full blocks are cached.`);
  return sentences.join(" ");
}

function finish(model, name) {
  if (!model.tables.has(name)) return `${name} does not run, so nothing happens.`;
  const held = model.finish(name);
  const of = (test) => held.filter(test);
  const freed = of((block) => model.allocator.refCount(block) === 0);
  const idle = of((block) => model.cache.idle.includes(block)).reverse();
  const shared = of((block) => !freed.includes(block) && !idle.includes(block));
  const are = (list) => (list.length > 1 ? "are" : "is");
  const sentences = [`${name} ends.`];
  if (shared.length) sentences.push(`${blocks(shared)} ${are(shared)} still in another table.`);
  if (idle.length) sentences.push(`${blocks(idle)} ${are(idle)} idle now, to be evicted in this order.`);
  if (freed.length) sentences.push(`${blocks(freed)}, which ${are(freed)} not full, ${are(freed)} free.`);
  return sentences.join(" ");
}

customElements.define("prefix-cache-figure", PrefixCacheFigure);
