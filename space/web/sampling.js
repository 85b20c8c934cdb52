// Sampling of the next token from a Float32Array of logits; the sampler of transformers.js has no top-p.
const descending = (logits) => logits.slice().sort().reverse(); // without a comparator, which would take ten times as long
const sum = (values) => values.reduce((total, value) => total + value, 0);
const toWeights = (logits, largest, temperature) => logits.map((logit) => Math.exp((logit - largest) / (temperature || 1)));
const idsAbove = (logits, threshold) => logits.reduce((ids, logit, id) => (logit >= threshold && ids.push(id), ids), []);

// Count the tokens that temperature, top-k and top-p leave, in the order of transformers.
function countKept(sorted, { temperature, top_k, top_p }) {
    if (!temperature) return 1;
    const weights = toWeights(sorted.subarray(0, top_k || sorted.length), sorted[0], temperature), mass = sum(weights);
    let kept = 0;
    for (let before = 0; kept < weights.length && before < top_p * mass; kept++) before += weights[kept];
    return kept;
}

// Sample a token id; `uniform` is a number in [0, 1).
export function sample(logits, settings, uniform) {
    if (!settings.temperature) return logits.reduce((best, logit, id) => (logit > logits[best] ? id : best), 0);
    const sorted = descending(logits), ids = idsAbove(logits, sorted[countKept(sorted, settings) - 1]);
    const weights = toWeights(ids.map((id) => logits[id]), sorted[0], settings.temperature);
    let left = uniform * sum(weights);
    return ids.find((_, index) => (left -= weights[index]) < 0) ?? ids.at(-1); // by rounding, a little may be left
}

// The most likely tokens with their probabilities before top-k and top-p. Temperature 0 shows those at 1.
export function distribution(logits, settings, number) {
    const sorted = descending(logits), total = sum(toWeights(sorted, sorted[0], settings.temperature));
    const ids = idsAbove(logits, sorted[Math.min(number, sorted.length) - 1]).sort((a, b) => logits[b] - logits[a]);
    const probabilities = toWeights(ids.map((id) => logits[id]), sorted[0], settings.temperature).map((weight) => weight / total);
    const rows = ids.slice(0, number).map((id, rank) => ({ id, probability: probabilities[rank] }));
    return { rows, kept: countKept(sorted, settings), size: logits.length };
}
