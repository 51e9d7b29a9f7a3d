/** `<sampling-figure>`: a real distribution of the next token, through the steps of the sampler. */

import { Picture, legend } from "picture";
import { draw, isGreedy, softmax, stages } from "sampling";
import { SteppedFigure, select, slider } from "stepped_figure";

/**
 * The logits after a prompt. likeliest: id, text and logit of each. tail: the other tokens in groups of about the same
 * logit: the logit and the number of tokens.
 * @typedef {{prompt: string, likeliest: [number, string, number][], tail: [number, number][]}} Prompt
 */

const DEFAULTS = { temperature: 1, minP: 0.05, topK: 12, topP: 0.8, seed: 1, index: 0 };
const DEFAULT_PROMPT = "1";
const REMOVERS = ["", "greedy", "min-p", "top-k", "top-p"]; // by step; in step 1 only a temperature of 0 removes
const NAMES = ["", "", "Min-p", "Top-k", "Top-p"]; // of the filters, by step
const DRAW = 5; // the last step
const NUM_ROWS = 16; // tokens with a row of their own
const [LABEL, NUMBER] = [116, 56]; // px, the widths of a row's text and of its number
const [ROW, BAR, STRIP] = [21, 16, 34]; // px, heights
const CHARACTER = 7.4; // px, the width of a character in the strip

class SamplingFigure extends SteppedFigure {
  #rows = []; // the vocabulary after each prompt
  #uniform = []; // by seed and output index
  #prompt = null;
  #sliders = {};
  #u = 0;

  get name() {
    return "Probabilities of the next token; arrow keys change the step";
  }

  get numSteps() {
    return DRAW + 1;
  }

  get firstStep() {
    return 2;
  }

  prepare({ prompts, uniform }) {
    this.#rows = prompts.map((prompt) => new Vocabulary(prompt));
    this.#uniform = uniform;
    const names = Object.fromEntries(prompts.map(({ prompt }, place) => [place, prompt]));
    this.#prompt = select("Prompt", names, DEFAULT_PROMPT, () => this.show(this.step));
    const orOff = (isOn, text) => (isOn ? text : "off");
    const make = (step, label, limits, value, shown, onChange = () => {}) =>
      slider(label, limits, value, shown, (now) => {
        onChange(now);
        this.show(Math.max(this.step, step));
      });
    const decide = () => this.#chooseNumber();
    const [seeds, indices] = [uniform.length, uniform[0].length];
    this.#sliders = {
      temperature: make(1, "Temperature", [0, 2, 0.05], DEFAULTS.temperature, (t) => t.toFixed(2)),
      minP: make(2, "Min-p", [0, 1, 0.01], DEFAULTS.minP, (p) => orOff(p > 0, p.toFixed(2))),
      topK: make(3, "Top-k", [0, 40, 1], DEFAULTS.topK, (k) => orOff(k > 0, `${k}`)),
      topP: make(4, "Top-p", [0.01, 1, 0.01], DEFAULTS.topP, (p) => orOff(p < 1, p.toFixed(2))),
      seed: make(DRAW, "Seed", [0, seeds - 1, 1], DEFAULTS.seed, String, decide),
      index: make(DRAW, "Output index", [0, indices - 1, 1], DEFAULTS.index, String, decide),
      u: make(DRAW, "u", [0, 0.999, 0.001], 0, (u) => u.toFixed(3), (u) => (this.#u = u)),
    };
    this.#chooseNumber();
  }

  ownControls() {
    const { temperature, minP, topK, topP, seed, index, u } = this.#sliders;
    const rows = [[temperature, minP], [topK, topP], [seed, index, u]];
    return [[this.#prompt], ...rows.map((row) => row.map(({ label }) => label))];
  }

  reset() {
    this.#prompt.querySelector("select").value = DEFAULT_PROMPT;
    for (const [name, value] of Object.entries(DEFAULTS)) this.#sliders[name].value = value;
    this.#chooseNumber();
    super.reset();
  }

  describe(step) {
    const run = this.#run();
    if (step === 0) return sayStart(run);
    if (isGreedy(run.params)) return "A temperature of 0 takes the largest logit: no division, no filter and no draw.";
    if (step === DRAW) return this.#sayDraw(run);
    return step === 1 ? sayTemperature(run) : sayFilter(run, step);
  }

  draw(step, width) {
    const run = this.#run();
    const place = Math.min(step, run.shares.length - 1);
    const drawn = step === DRAW && !isGreedy(run.params) ? draw(run.after[place], run.counts, this.#u) : null;
    const picture = new Picture();
    const bars = Math.max(90, width - LABEL - NUMBER - 4);
    const rows = rowsOf(run, place);
    const scale = bars / Math.max(...rows.flatMap(({ share, first }) => [share, first]));
    rows.forEach((row, line) => drawRow(picture, 2 + line * ROW, row, bars, scale, drawn));
    const top = 2 + rows.length * ROW + 26;
    drawStrip(picture, top, LABEL + bars + NUMBER - 4, run, place, drawn, this.#u);
    const entries = { blue: "possible", free: "removed", ...(drawn === null ? {} : { orange: "drawn" }) };
    legend(picture, 2, top + STRIP + 44, entries);
    return [picture.node("the probabilities of the likeliest tokens, and the line from which one is drawn")];
  }

  /** The chosen prompt's vocabulary, the parameters, and logits and probabilities after each step. */
  #run() {
    const vocabulary = this.#rows[Number(this.#prompt.querySelector("select").value)];
    const { logits, counts } = vocabulary;
    const params = Object.fromEntries(Object.entries(this.#sliders).map(([name, { value }]) => [name, value]));
    const after = stages(logits, counts, params);
    return { vocabulary, counts, params, after, shares: after.map((one) => softmax(one, counts)) };
  }

  #sayDraw({ vocabulary, counts, params: { seed, index }, after }) {
    const u = this.#u;
    const isOfSeed = u === this.#uniform[seed][index];
    const source = isOfSeed ? `Seed ${seed} and output index ${index} give u = ` : "You chose u = ";
    const [id, text] = vocabulary.names[draw(after.at(-1), counts, u)] ?? [];
    const chosen = id === undefined ? "one of the tokens without a row" : `${text} (id ${id})`;
    return `${source}${u.toFixed(3)}, so the draw looks for 1 - u = ${(1 - u).toFixed(3)}. In the order of the ids, `
      + `the first token whose cumulative sum reaches it is ${chosen}.`;
  }

  #chooseNumber() {
    this.#u = this.#uniform[this.#sliders.seed.value][this.#sliders.index.value];
    this.#sliders.u.value = this.#u;
  }
}

/** The tokens after a prompt: groups of one in the order of their ids, then the groups of all others. */
class Vocabulary {
  /** @param {Prompt} prompt */
  constructor({ likeliest, tail }) {
    const own = [...likeliest].sort(([one], [other]) => one - other);
    /** Id and text of the tokens that are shown. @type {[number, string][]} */
    this.names = own.map(([id, text]) => [id, visible(text)]);
    this.logits = [...own.map(([, , logit]) => logit), ...tail.map(([logit]) => logit)];
    this.counts = [...own.map(() => 1), ...tail.map(([, count]) => count)];
    /** The groups of one, the likeliest first. */
    this.order = likeliest.map(([id]) => own.findIndex(([other]) => other === id));
    /** The groups of all others. */
    this.others = tail.map((_, place) => own.length + place);
    this.size = sum(this.counts);
  }
}

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const percent = (share) => `${(100 * share).toFixed(1)}%`;
const grouped = (count) => count.toLocaleString("en");

/** A token's text with its spaces and line breaks visible. */
const visible = (text) => text.replaceAll(" ", "\u2423").replaceAll("\n", "\u21b5");

/** The number of tokens that are possible, among some groups or among all. */
const numKept = (counts, logits, groups = [...counts.keys()]) =>
  sum(groups.filter((group) => logits[group] > -Infinity).map((group) => counts[group]));

/**
 * The rows of the picture after a step: the likeliest tokens, the next ones together, all others together.
 * @typedef {{text: string, groups: number[], share: number, first: number, remover: string | null}} Row
 *   share: the probability, before the removal if it was removed. first: the probability in step 0.
 * @returns {Row[]}
 */
function rowsOf({ vocabulary, counts, after, shares }, place) {
  const row = (name, groups) => {
    const shareAt = (step) => sum(groups.map((group) => shares[step][group]));
    const [kept, total] = [numKept(counts, after[place], groups), sum(groups.map((group) => counts[group]))];
    const text = kept && kept < total ? `${grouped(kept)} of ${grouped(total)}` : name;
    const gone = kept ? null : after.findIndex((logits) => numKept(counts, logits, groups) === 0);
    const share = shareAt(kept ? place : gone - 1);
    return { text, groups, share, first: shareAt(0), remover: kept ? null : REMOVERS[gone] };
  };
  const { names, order, others } = vocabulary;
  const [own, next] = [order.slice(0, NUM_ROWS), order.slice(NUM_ROWS)];
  const rest = grouped(sum(others.map((group) => counts[group])));
  const rows = own.map((group) => row(names[group][1], [group]));
  return [...rows, row(`next ${next.length}`, next), row(`${rest} others`, others)];
}

function drawRow(picture, y, { text, groups, share, first, remover }, bars, scale, drawn) {
  picture.label(2, y + 12.5, text, "chip");
  const hue = groups.includes(drawn) ? "orange lit" : "blue";
  picture.cell(LABEL, y, Math.max(1, scale * share), BAR, remover ? "free" : hue);
  picture.line([LABEL + scale * first, y - 1], [LABEL + scale * first, y + BAR + 1], "arrow");
  const [note, kind] = remover ? [remover, "small"] : [percent(share), "chip"];
  picture.label(LABEL + bars + NUMBER - 4, y + 12.5, note, kind, "end");
}

/** The line from 0 to 1: the possible tokens in the order of their ids, the others last, and a draw's threshold. */
function drawStrip(picture, y, width, { vocabulary, shares }, place, drawn, u) {
  picture.label(2, y - 8, "in the order of the ids", "small");
  let left = 0;
  const part = (share, text, style) => {
    const fits = text.length * CHARACTER < share * width - 6;
    picture.cell(2 + left * width, y, share * width, STRIP, style, fits ? text : "");
    left += share;
  };
  vocabulary.names.forEach(([, text], group) => {
    const share = shares[place][group];
    if (share > 0) part(share, text, group === drawn ? "orange lit" : "blue");
  });
  const others = sum(vocabulary.others.map((group) => shares[place][group]));
  if (others > 0) part(others, "others", vocabulary.others.includes(drawn) ? "orange lit" : "blue");
  picture.label(2, y + STRIP + 16, "0", "small");
  picture.label(2 + width, y + STRIP + 16, "1", "small", "end");
  if (drawn === null) return;
  const at = 2 + (1 - u) * width;
  picture.line([at, y - 4], [at, y + STRIP + 6], "arrow");
  const middle = Math.min(Math.max(at, 60), width - 60);
  picture.label(middle, y + STRIP + 18, `1 - u = ${(1 - u).toFixed(3)}`, "text", "middle");
}

function sayStart({ vocabulary, shares }) {
  const { names, order, size } = vocabulary;
  const listed = sum(order.map((group) => shares[0][group]));
  return `The model's own distribution: of ${grouped(size)} tokens, ${names[order[0]][1]} is the likeliest, with `
    + `${percent(shares[0][order[0]])}, and the ${order.length} likeliest have ${percent(listed)} together.`;
}

function sayTemperature({ vocabulary, params: { temperature }, shares }) {
  if (temperature === 1) return "Temperature 1 divides all logits by 1: nothing changes.";
  const [before, now] = [0, 1].map((step) => percent(shares[step][vocabulary.order[0]]));
  const effect = temperature < 1 ? "Likely tokens gain" : "Unlikely tokens gain";
  const divisor = temperature.toFixed(2);
  return `Temperature ${divisor} divides all logits by ${divisor}. ${effect}: the likeliest had ${before} and has `
    + `${now}. The order stays.`;
}

/** What a filter does, by step; false if it is off. */
const RULES = {
  2: ({ minP }, largest) => minP > 0 && `Min-p ${minP.toFixed(2)}: a token needs ${minP.toFixed(2)} times `
    + `${percent(largest)}, which is ${percent(minP * largest)}.`,
  3: ({ topK }) => topK > 0 && `Top-k ${topK}: the likeliest ${topK} stay, and any as likely as the last of them.`,
  4: ({ topP }) => topP < 1 && `Top-p ${topP.toFixed(2)}: from the likeliest on, tokens stay until their sum is at `
    + `least ${percent(topP)}.`,
};

function sayFilter({ vocabulary, counts, params, after, shares }, step) {
  const [before, kept] = [step - 1, step].map((place) => numKept(counts, after[place]));
  const rule = RULES[step](params, shares[step - 1][vocabulary.order[0]]);
  if (!rule) return `${NAMES[step]} is off: all ${grouped(before)} tokens stay possible.`;
  const stay = `${grouped(kept)} ${kept === 1 ? "stays" : "stay"}`;
  return `${rule} Of ${grouped(before)} possible tokens, ${stay}, and the probabilities sum to 1 again.`;
}

customElements.define("sampling-figure", SamplingFigure);
