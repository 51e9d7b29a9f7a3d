/** The event log: one line for each important event, newest first. */

const MAX_LINES = 200;

export class Log {
  #list = document.querySelector("#log");
  #start = 0;

  /** onPoint: called with the blocks named in the line under the pointer. */
  constructor(labels, onPoint) {
    this.labels = labels;
    this.#list.addEventListener("pointerover", ({ target }) => {
      onPoint(target.closest("[data-names]")?.dataset.names.split(" ") ?? []);
    });
    this.#list.addEventListener("pointerleave", () => onPoint([]));
  }

  /** Clear the log. Times are seconds since `t` on the server's clock. */
  reset(t) {
    this.#start = t;
    this.#list.replaceChildren();
  }

  /** Add the lines of some changes, oldest change first. */
  add(changes) {
    const lines = changes.flatMap((change) => linesOf(change, this.labels).map((line) => ({ t: change.t, ...line })));
    for (const line of lines.slice(-MAX_LINES)) this.#add(line);
    while (this.#list.children.length > MAX_LINES) this.#list.lastChild.remove();
  }

  #add({ t, kind, text, evicted, names }) {
    const newest = this.#list.firstChild;
    if (evicted && newest?.dataset.evicted) { // a full pool evicts in most steps: merge the lines
      evicted += Number(newest.dataset.evicted);
      newest.remove();
    }
    const item = document.createElement("li");
    item.dataset.kind = kind;
    const time = document.createElement("time");
    time.textContent = (t - this.#start).toFixed(2);
    if (evicted) item.dataset.evicted = evicted;
    if (names) item.dataset.names = names.join(" ");
    item.append(time, evicted ? `evicted: ${blocks(evicted)} of the prefix cache` : text);
    this.#list.prepend(item);
  }
}

/**
 * The lines of a step, in the order of its events.
 * @param {import("./pool.js").Change} change
 * @returns {{kind: string, text: string, evicted?: number, names?: number[]}[]} evicted: the number of evicted blocks;
 *   names: the blocks named in the text
 */
export function linesOf(change, labels) {
  const of = (kind) => change.events.filter(([name]) => name === kind);
  const lines = [];
  const say = (kind, text) => lines.push({ kind, text });
  const [out, back, evicted] = ["swapped_out", "swapped_in", "evicted"].map(of);
  for (const one of change.preempted) say("preempted", preemption(one, labels.of(one)));
  if (out.length) say("swapped_out", `swapped out: ${blocks(out.length)} copied to host memory`);
  for (const one of change.admitted) {
    if (one.wasPreempted || !labels.isFork(one)) say("admitted", admission(one, labels.of(one)));
  }
  if (back.length) say("swapped_in", `swapped in: ${blocks(back.length)} copied from host memory`);
  if (evicted.length) lines.push({ kind: "evicted", text: "", evicted: evicted.length });
  for (const one of change.admitted) {
    if (one.cached && !one.wasPreempted && !labels.isFork(one)) {
      say("hit", `prefix hit: ${one.cached} of ${one.prompt} prompt tokens of ${labels.of(one)}`);
    }
  }
  for (const copy of change.copies) {
    lines.push({ kind: "copied", text: copied(copy, labels), names: [copy.from, copy.to] });
  }
  for (const one of change.admitted) {
    if (!one.wasPreempted && labels.isFork(one)) say("forked", `forked: ${labels.of(one)} shares the blocks of its prompt`);
  }
  for (const one of change.ended) say("ended", `${labels.of(one)} finished`);
  return lines;
}

function preemption(one, name) {
  return one.host_blocks
    ? `${name} preempted: ${blocks(one.host_blocks)} in host memory`
    : `${name} preempted: its blocks are freed and recomputed later`;
}

/** A write to a shared block copies it first. A cached block that only matches in its first tokens is copied too. */
function copied({ from, to, holder, isHeld }, labels) {
  const reader = holder ? ` for ${labels.of(holder)}` : "";
  return isHeld
    ? `copy-on-write: block ${from} copied to ${to}${reader}`
    : `copy-on-write: partly matching cached block ${from} copied to ${to}${reader}`;
}

const admission = (one, name) => (one.wasPreempted ? `${name} resumed` : `${name} started`);

const blocks = (count) => (count === 1 ? "1 block" : `${count} blocks`);
