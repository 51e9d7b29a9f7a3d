/** Connects the parts of the page: the stream to the pool, the pool to its views, and the controls to both. */

import { Announcer } from "./announcer.js";
import { Grid } from "./blocks.js";
import { Chat } from "./chat.js";
import { Demo } from "./demo.js";
import { Figures } from "./figures.js";
import { Focus } from "./focus.js";
import { KeyField } from "./key.js";
import { Known } from "./known.js";
import { Labels } from "./labels.js";
import { listen } from "./live.js";
import { Log } from "./log.js";
import { PAUSED, Playback, REAL_TIME } from "./playback.js";
import { Pool } from "./pool.js";
import { Requests } from "./requests.js";
import { BlockTable } from "./tables.js";

const find = (selector) => document.querySelector(selector);

const DEMO_PACE = 5; // steps a second
let isPaceChosen = false; // by the user; until then a load chooses it

const [pool, playback, labels, known] = [new Pool(), new Playback(), new Labels(), new Known()];
const [keyField, announcer, figures] = [new KeyField(), new Announcer(), new Figures(pool)];
const log = new Log(labels, (blocks) => grid.mark(blocks));
const focus = new Focus(pool, labels, drawFocus);
const grid = new Grid(pool, labels, {
  onPoint: (block) => {
    focus.pointAtBlock(block);
    table.point(block);
  },
  onChoose: (block) => focus.chooseBlock(block),
  onLayout: () => table?.layout(),
});
const table = new BlockTable(labels, grid);
const requests = new Requests(pool, labels, known, {
  onPoint: (id) => focus.pointAt(id),
  onChoose: (id) => focus.choose(id),
});
const ask = (path, options) => keyField.events(path, options);
const chat = new Chat(ask, known, announcer);
const demo = new Demo(pool, ask, known, {
  onStart: () => {
    if (!isPaceChosen) setPace(DEMO_PACE);
  },
  onStop: () => {
    if (!isPaceChosen) setPace(REAL_TIME);
    if (playback.pace !== PAUSED) show(playback.catchUp());
  },
  hasShown: () => playback.behind === 0,
});

// The stream.

const STATES = {
  connecting: "Connecting …",
  key: "", // the form for the key shows a text
  loading: "The server is loading its model or shutting down. Trying again …",
  lost: "The connection to the server is lost. Trying again …",
  off: "This server runs with --no-live: its pool is hidden. The chat works.",
  no_blocks: "This server runs with --batching dense: it has no pool of blocks. The chat works.",
};

function showState(state) {
  document.body.dataset.live = state;
  demo.enable(pool.numBlocks > 0, state === "live");
  const { numBlocks, blockSize } = pool;
  setText("#status", state === "live" ? "Connected." : STATES[state]);
  if (state === "live") setText("#pool-size", `${numBlocks.toLocaleString("en")} blocks, each for the keys and values of ${blockSize} tokens`);
}

function take(message) {
  if (message.type === "steps") {
    known.note(message.steps);
    chat.refresh();
    playback.push(message.steps);
    schedule();
    return;
  }
  playback.clear();
  pool.reset(message);
  labels.clear();
  for (const sequence of pool.sequences.values()) labels.add(sequence);
  focus.reset();
  log.reset(message.t);
  figures.reset();
  grid.reset();
  setText("#model", pool.model);
  showState("live");
  drawRest();
}

// The replay.

let isScheduled = false;

function schedule() {
  if (isScheduled) return;
  isScheduled = true;
  if (document.hidden) setTimeout(pump, 500);
  else requestAnimationFrame(pump);
}

document.addEventListener("visibilitychange", () => {
  isScheduled = false; // a hidden page gets no animation frames
  schedule();
});

function pump() {
  isScheduled = false;
  show(playback.due(performance.now()));
  if (playback.behind && playback.pace !== PAUSED) schedule();
}

function show(steps) {
  const changes = steps.map((step) => {
    for (const sequence of step.sequences) labels.add(sequence);
    const change = pool.step(step);
    figures.note(change);
    return change;
  });
  if (changes.length) {
    log.add(changes);
    const blocks = new Set(changes.flatMap((change) => [...change.blocks]));
    const events = changes.slice(-20).flatMap((change) => change.events);
    grid.update(blocks, new Map(events.map(([kind, block]) => [block, kind])));
    const remaining = [...pool.sequences.values()];
    for (const change of changes) for (const sequence of change.ended) labels.finish(sequence, remaining);
    announcer.summarize(summary);
  }
  drawRest();
}

function drawRest() {
  figures.update();
  drawFocus();
  setText("#behind", distance(playback));
  find("#catch-up").setAttribute("aria-disabled", playback.behind === 0);
}

function drawFocus() {
  requests.update(focus.chosen);
  table?.show(focus.sequence);
  setText("#detail", focus.detail);
}

/** How far the page is behind the engine. */
function distance({ behind }) {
  if (!behind) return "";
  const steps = behind === 1 ? "1 step" : `${behind.toLocaleString("en")} steps`;
  return `${steps} behind; the engine runs at full speed`;
}

function summary() {
  const { stats, numBlocks } = pool;
  const held = numBlocks - stats.free - stats.cached;
  return `${stats.running} running, ${stats.waiting} waiting, ${held} of ${numBlocks} blocks in use, `
    + `${stats.preemptions} preemptions.`;
}

function setText(selector, text) {
  const element = find(selector);
  if (element.textContent !== text) element.textContent = text;
}

// The controls.

function setPace(pace) {
  find(`#pace input[value='${pace === REAL_TIME ? "real" : pace}']`).checked = true;
  playback.pace = pace;
  schedule();
}

find("#pace").addEventListener("change", ({ target }) => {
  isPaceChosen = true;
  setPace(target.value === "real" ? REAL_TIME : Number(target.value));
});
find("#one-step").addEventListener("click", () => {
  isPaceChosen = true;
  setPace(PAUSED);
  show(playback.one());
});
find("#catch-up").addEventListener("click", () => show(playback.catchUp()));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  chat.stop();
  demo.stop();
});

// In a narrow window the pool comes first, on the screen and in the keyboard's order.

const narrow = matchMedia("(max-width: 999px)");

function arrange() {
  const [main, chatPanel, poolPanel, messages] = ["main", ".chat", ".pool", "#messages"].map(find);
  const [first, second] = narrow.matches ? [poolPanel, chatPanel] : [chatPanel, poolPanel];
  if (first.nextElementSibling === second) return;
  const { scrollTop } = messages;
  if (first.contains(document.activeElement)) main.append(second); // an element that moves loses the focus
  else main.prepend(first);
  messages.scrollTop = scrollTop;
}

narrow.addEventListener("change", arrange);
arrange();

listen({ onMessage: take, onState: showState, askKey: () => keyField.ask() });
