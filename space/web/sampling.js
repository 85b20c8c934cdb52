// Sampling of the next token. transformers.js has no top-p, and its sampler cannot be seeded for one generation alone.

// Sort the tokens by probability, and count those that temperature, top-k and top-p leave, in the order of transformers.
// The probabilities are those at the temperature, before top-k and top-p; temperature 0 is greedy and shows those at 1.
export function distribution(logits, { temperature, top_k, top_p }) {
    const ids = Uint32Array.from(logits, (_, id) => id).sort((a, b) => logits[b] - logits[a] || a - b);
    const weights = Float64Array.from(ids, (id) => Math.exp((logits[id] - logits[ids[0]]) / (temperature || 1)));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    const probabilities = weights.map((weight) => weight / total);
    if (!temperature) return { ids, probabilities, kept: 1 };
    const limit = top_k ? Math.min(top_k, ids.length) : ids.length;
    const mass = probabilities.subarray(0, limit).reduce((sum, probability) => sum + probability, 0);
    let kept = 0;
    for (let sum = 0; kept < limit && sum < top_p * mass; kept++) sum += probabilities[kept];
    return { ids, probabilities, kept };
}

// Sample a token id; `uniform` is a number in [0, 1).
export function sample(logits, settings, uniform) {
    if (!settings.temperature) return logits.reduce((best, logit, id) => (logit > logits[best] ? id : best), 0);
    const { ids, probabilities, kept } = distribution(logits, settings);
    let left = uniform * probabilities.subarray(0, kept).reduce((sum, probability) => sum + probability, 0);
    for (let rank = 0; rank < kept; rank++) if ((left -= probabilities[rank]) < 0) return ids[rank];
    return ids[kept - 1]; // by rounding, a little may be left
}
