/**
 * Sampling: the reference's `sampler.py` in JavaScript, for groups of tokens. A group has one logit and a number of
 * tokens with that logit; a token that is shown is a group of one. Arrays are in the order of the groups. Not of the
 * page.
 */

const MIN_TEMPERATURE = 1e-5; // less is greedy

/**
 * @typedef {{temperature: number, minP: number, topK: number, topP: number}} Params
 *   `minP` and `topK` are off at 0, and `topP` at 1
 */

/** The probability of each group: that of all its tokens together. @returns {number[]} */
export function softmax(logits, counts) {
  const largest = Math.max(...logits);
  const weights = logits.map((logit, group) => counts[group] * Math.exp(logit - largest));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}

/** Keep the k tokens with the largest logits, and those with the same logit as the last of them. */
export function keepTopK(logits, counts, k) {
  let tokens = 0;
  return cut(logits, (group) => {
    tokens += counts[group];
    return tokens - counts[group] < k;
  });
}

/** Keep the likeliest tokens until their probabilities sum to at least p. */
export function keepTopP(logits, counts, p) {
  const probabilities = softmax(logits, counts);
  let sum = 0;
  return cut(logits, (group) => {
    sum += probabilities[group];
    return sum - probabilities[group] < p && Math.fround(probabilities[group] / counts[group]) > 0;
  });
}

/** Keep the tokens that are at least `minP` times as likely as the likeliest. */
export function keepMinP(logits, minP) {
  const largest = Math.max(...logits);
  return logits.map((logit) => (Math.exp(logit - largest) >= minP ? logit : -Infinity));
}

/** The first group at which the cumulative sum of the probabilities reaches 1 - u times the last sum. */
export function draw(logits, counts, u) {
  const sums = [];
  softmax(logits, counts).forEach((probability, group) => sums.push((sums[group - 1] ?? 0) + probability));
  return sums.findIndex((sum) => sum >= (1 - u) * sums.at(-1));
}

/** True if the largest logit is always chosen. @param {Params} params */
export const isGreedy = ({ temperature }) => temperature < MIN_TEMPERATURE;

/**
 * The logits before the first step, and after the temperature, min-p, top-k and top-p.
 * @param {Params} params
 * @returns {number[][]}
 */
export function stages(logits, counts, params) {
  if (isGreedy(params)) {
    const chosen = logits.indexOf(Math.max(...logits));
    return [logits, ...Array(4).fill(logits.map((logit, group) => (group === chosen ? logit : -Infinity)))];
  }
  const { temperature, minP, topK, topP } = params;
  const warm = logits.map((logit) => logit / temperature);
  const afterMinP = minP > 0 ? keepMinP(warm, minP) : warm;
  const afterTopK = topK > 0 ? keepTopK(afterMinP, counts, topK) : afterMinP;
  const afterTopP = topP < 1 ? keepTopP(afterTopK, counts, topP) : afterTopK;
  return [logits, warm, afterMinP, afterTopK, afterTopP];
}

/** Go through the groups from the largest logit on, and remove all below the last one that `stays`. */
function cut(logits, stays) {
  const order = logits.map((_, group) => group).sort((one, other) => logits[other] - logits[one]);
  const least = Math.min(...order.filter((group) => stays(group)).map((group) => logits[group]));
  return logits.map((logit) => (logit >= least ? logit : -Infinity));
}
