/** `<allocation-figure>`: the same requests in three memories of the same size, each with its own way to allocate. */

import { Adjacent, PACE, Paged, Reserved, Server } from "allocation";
import { GAP, HUES, Picture, grid, legend } from "picture";
import { SteppedFigure, select } from "stepped_figure";
import { counted, listed } from "wording";

const CAPACITY = 96; // tokens
const MAX_STEPS = 80;
const [WIDTH, HEIGHT] = [27, 34]; // px, of a block

const TITLES = [
  ["Contiguous", "adjacent blocks for the longest length, at once"],
  ["Dynamic", "adjacent blocks, on demand"],
  ["Paged", "any blocks, on demand, found by a block table"],
];
const WORKLOADS = {
  mixed: "mixed lengths",
  short: "short ones",
  long: "long ones",
};
/** Prompt and final length in tokens of each request; one arrives in each step. */
const LENGTHS = {
  mixed: [[11, 25], [5, 16], [12, 26], [5, 8], [5, 12], [11, 22], [11, 25], [17, 27], [17, 28], [5, 17]],
  short: [[3, 7], [4, 9], [2, 5], [6, 8], [3, 12], [5, 7], [4, 11], [2, 6], [6, 10], [3, 8]],
  long: [[20, 30], [12, 32], [24, 28], [9, 31], [18, 26], [15, 32], [22, 30], [11, 29]],
};

class AllocationFigure extends SteppedFigure {
  #workload = select("Requests", WORKLOADS, "mixed", () => this.#restart());
  #longest = select("Longest length", tokens([16, 32, 48]), "32", () => this.#restart());
  #size = select("Block size", tokens([2, 4, 8]), "4", () => this.#restart());
  #frames = [];

  get name() {
    return "Three memories of the same size; arrow keys change the step";
  }

  get numSteps() {
    return this.#frames.length;
  }

  get firstStep() {
    return Math.min(6, this.numSteps - 1);
  }

  prepare() {
    this.#frames = simulate(valueOf(this.#workload), Number(valueOf(this.#longest)), Number(valueOf(this.#size)));
  }

  ownControls() {
    return [[this.#workload, this.#longest, this.#size]];
  }

  describe(step) {
    if (!step) return "Three empty memories of the same size. A request arrives in each of the next steps.";
    const told = this.#frames[step].map(({ events }, place) => `${TITLES[place][0]}: ${events.join(", ")}.`);
    const news = told.filter((_, place) => this.#frames[step][place].events.length);
    return news.length ? news.join(" ") : `No request starts, waits or ends: each running one has ${PACE} more tokens.`;
  }

  draw(step, width) {
    const picture = new Picture();
    const columns = [24, 16, 12].find((count) => count * (WIDTH + GAP) <= width) ?? 8;
    let y = 14;
    this.#frames[step].forEach((frame, place) => {
      picture.label(2, y, TITLES[place][0], "name");
      if (width > 500) picture.label(110, y, TITLES[place][1], "small");
      y = grid(2, y + 20, frame.cells, columns, WIDTH, HEIGHT, (left, top, cell, block) => {
        picture.label(left + WIDTH / 2, top - 3, `${block}`, "note", "middle");
        picture.cell(left, top, WIDTH, HEIGHT, cell.style, cell.text, cell.note);
      });
      for (const line of wrapped(frame.facts, width)) {
        y += 16;
        picture.label(2, y, line, "small");
      }
      y += 30;
    });
    const entries = { blue: "a request's block", "blue dim": "reserved, empty", free: "free" };
    legend(picture, 2, y - 6, entries, width);
    return [picture.node("the blocks of three memories")];
  }

  reset() {
    for (const [label, value] of [[this.#workload, "mixed"], [this.#longest, "32"], [this.#size, "4"]]) {
      label.querySelector("select").value = value;
    }
    this.prepare();
    super.reset();
  }

  #restart() {
    this.prepare();
    this.show(this.step);
  }
}

const valueOf = (label) => label.querySelector("select").value;
const tokens = (counts) => Object.fromEntries(counts.map((count) => [count, `${count} tokens`]));
const hue = (name) => HUES[(name.charCodeAt(0) - 65) % HUES.length];

/** What each memory shows in each step. */
function simulate(workload, longest, size) {
  const numBlocks = CAPACITY / size;
  const memories = [new Reserved(numBlocks, size, longest), new Adjacent(numBlocks, size), new Paged(numBlocks, size)];
  const servers = memories.map((memory) => new Server(memory));
  const requests = LENGTHS[workload].map(([prompt, total], place) => (
    { name: String.fromCharCode(65 + place), arrival: place + 1, prompt, total }
  ));
  const frames = [servers.map(frameOf)];
  for (let step = 1; step < MAX_STEPS; step += 1) {
    const arriving = requests.filter(({ arrival }) => arrival === step);
    for (const server of servers) server.step(arriving);
    frames.push(servers.map(frameOf));
    if (step > requests.length && servers.every((server) => server.isIdle)) break;
  }
  return frames;
}

function frameOf(server) {
  const { memory, running, waiting, finished, refused, copied, events } = server;
  const cells = memory.free.map(() => ({ style: "free" }));
  let [held, stored] = [0, 0];
  for (const [name, count] of running) {
    memory.blocksOf(name).forEach((block, place) => {
      const inside = Math.max(0, Math.min(memory.blockSize, count - place * memory.blockSize));
      const isFull = inside === memory.blockSize;
      const note = isFull || !inside ? "" : `${inside}/${memory.blockSize}`;
      cells[block] = inside ? { style: hue(name), text: name, note } : { style: `${hue(name)} dim` };
      held += 1;
      stored += inside;
    });
  }
  const share = held ? `, ${Math.round((100 * stored) / (held * memory.blockSize))}% filled` : "";
  const names = waiting.map(({ request }) => request.name);
  const facts = [
    `${running.size} running`,
    names.length ? `waiting: ${listed(names)}` : "none waiting",
    `${finished} finished${refused ? `, ${refused} refused` : ""}`,
    `${held} of ${memory.numBlocks} blocks held${share}`,
    ...(copied ? [`${counted(copied, "block")} copied so far`] : []),
  ];
  return { cells, facts, events };
}

/** Facts in as few lines as the width allows. */
function wrapped(facts, width) {
  const lines = [""];
  for (const fact of facts) {
    const longer = lines.at(-1) ? `${lines.at(-1)} · ${fact}` : fact;
    if (lines.at(-1) && longer.length * 6.6 > width) lines.push(fact);
    else lines[lines.length - 1] = longer;
  }
  return lines;
}

customElements.define("allocation-figure", AllocationFigure);
