/** What happened, in words: a line for an event that is worth one, the newest on top. */

const MOST_LINES = 200;

export class Log {
  #list = document.querySelector("#log");
  #start = 0;

  /** onPoint: called with the blocks that the line under the pointer names. */
  constructor(labels, onPoint) {
    this.labels = labels;
    this.#list.addEventListener("pointerover", ({ target }) => {
      onPoint(target.closest("[data-names]")?.dataset.names.split(" ") ?? []);
    });
    this.#list.addEventListener("pointerleave", () => onPoint([]));
  }

  /** Begin anew: times are seconds since `t`, by the server's clock. */
  reset(t) {
    this.#start = t;
    this.#list.replaceChildren();
  }

  /** Add the lines of changes, in the order in which they came. */
  add(changes) {
    const lines = changes.flatMap((change) => linesOf(change, this.labels).map((line) => ({ t: change.t, ...line })));
    for (const line of lines.slice(-MOST_LINES)) this.#add(line);
    while (this.#list.children.length > MOST_LINES) this.#list.lastChild.remove();
  }

  #add({ t, kind, text, evicted, names }) {
    const newest = this.#list.firstChild;
    if (evicted && newest?.dataset.evicted) { // a full pool evicts all the time: one line is enough
      evicted += Number(newest.dataset.evicted);
      newest.remove();
    }
    const item = document.createElement("li");
    item.dataset.kind = kind;
    const time = document.createElement("time");
    time.textContent = (t - this.#start).toFixed(2);
    if (evicted) item.dataset.evicted = evicted;
    if (names) item.dataset.names = names.join(" ");
    item.append(time, evicted ? `evicted: the prefix cache gives up ${blocks(evicted)}` : text);
    this.#list.prepend(item);
  }
}

/**
 * The lines of a step, in the order of what happens in it.
 * @param {import("./pool.js").Change} change
 * @returns {{kind: string, text: string, evicted?: number, names?: number[]}[]} evicted: how many blocks were;
 *   names: the blocks that the text names
 */
export function linesOf(change, labels) {
  const of = (kind) => change.events.filter(([name]) => name === kind);
  const lines = [];
  const say = (kind, text) => lines.push({ kind, text });
  const [out, back, evicted] = ["swapped_out", "swapped_in", "evicted"].map(of);
  for (const one of change.preempted) say("preempted", preemption(one, labels.of(one)));
  if (out.length) say("swapped_out", `swapped out: ${blocks(out.length)} copied to the host`);
  for (const one of change.admitted) {
    if (one.wasPreempted || !labels.isFork(one)) say("admitted", admission(one, labels.of(one)));
  }
  if (back.length) say("swapped_in", `swapped in: ${blocks(back.length)} copied from the host`);
  if (evicted.length) lines.push({ kind: "evicted", text: "", evicted: evicted.length });
  for (const one of change.admitted) {
    if (one.cached && !one.wasPreempted && !labels.isFork(one)) {
      say("hit", `prefix hit: ${one.cached} of ${labels.of(one)}’s ${one.prompt} prompt tokens`);
    }
  }
  for (const copy of change.copies) {
    lines.push({ kind: "copied", text: copied(copy, labels), names: [copy.from, copy.to] });
  }
  for (const one of change.admitted) {
    if (!one.wasPreempted && labels.isFork(one)) say("forked", `forked: ${labels.of(one)} shares its prompt’s blocks`);
  }
  for (const one of change.ended) say("ended", `${labels.of(one)} has ended`);
  return lines;
}

function preemption(one, name) {
  return one.host_blocks
    ? `${name} preempted: ${blocks(one.host_blocks)} on the host`
    : `${name} preempted: its blocks are given up, to recompute`;
}

/** Blocks that others hold are copied on write; so is a kept one that begins alike and goes on otherwise. */
function copied({ from, to, holder, isHeld }, labels) {
  const reader = holder ? ` for ${labels.of(holder)}` : "";
  return isHeld
    ? `copy-on-write: block ${from} copied to ${to}${reader}`
    : `copy-on-write: cached block ${from}, a part of which fits, copied to ${to}${reader}`;
}

const admission = (one, name) => (one.wasPreempted ? `${name} goes on` : `${name} begins`);

const blocks = (count) => (count === 1 ? "1 block" : `${count} blocks`);
