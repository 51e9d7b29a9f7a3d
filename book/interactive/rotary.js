/** Rotary positions: frequencies, rotated vectors and scores, as in `rope.py` of the reference. */

/** The angle in radians by which each pair turns per position. @returns {number[]} of length headDim / 2 */
export function inverseFrequencies(headDim, base) {
  return Array.from({ length: headDim / 2 }, (_, pair) => base ** ((-2 * pair) / headDim));
}

/** A head's numbers, with each pair (i, i + D/2) turned by the position times the pair's frequency. */
export function rotate(head, position, frequencies) {
  const half = frequencies.length;
  const turned = [...head];
  frequencies.forEach((frequency, pair) => {
    const [cos, sin] = [Math.cos(position * frequency), Math.sin(position * frequency)];
    const [a, b] = [head[pair], head[pair + half]];
    turned[pair] = a * cos - b * sin;
    turned[pair + half] = b * cos + a * sin;
  });
  return turned;
}

/** What each pair adds to the dot product of two heads. */
export function parts(query, key) {
  const half = query.length / 2;
  return Array.from({ length: half }, (_, pair) => (
    query[pair] * key[pair] + query[pair + half] * key[pair + half]
  ));
}
