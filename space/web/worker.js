// The model and its tokenizer, in a worker so that the page never freezes. A message {id, action, argument} is answered
// with any number of {id, progress}, then {id, result} or {id, error}.
import { distribution, sample } from "./sampling.js";

const CDN = "https://cdn.jsdelivr.net/npm/";
const LIBRARY = ["@huggingface/transformers@4.3.2/dist/transformers.min.js",
    "sha384-xFDNfwR3J/vPYzGjMr1VSM8LHIcA+ii2Ha4x+6WAuISKpT9I0dxgF/mVQW+I0kSd"];
const ORT = "onnxruntime-web@1.31.0-dev.20260914-8d85527a0/dist/ort-wasm-simd-threaded"; // the version that LIBRARY contains
const RUNTIMES = {
    wasm: [[`${ORT}.mjs`, "sha384-rwgdUeIyqfd2lxMuhdqXYPnZiluDqSM5liz/q+ulIt4vYtB52NCoTVWBkm1KFOeN"],
        [`${ORT}.wasm`, "sha384-LrOPe1yNsLVzhsriuQfxO06RWx/XakR0S8uiOMx7HVJP6N/IEaR1EAgJMFeTanif"]],
    webgpu: [[`${ORT}.asyncify.mjs`, "sha384-ik7L7J2uXfXmGuWHh3yOUDPpUslz/dJjcvZgdX5hcItLjxlkEpUF7mpCcATr3Dg8"],
        [`${ORT}.asyncify.wasm`, "sha384-JuzrCV6BUmTUbsgNhgU94qo0vZ4l3w0VqgQAKPm0La2hXL9kmv8P9pGenfsWJY9c"]], // twice as large
};
const PROBE_LENGTH = 10;
const WEBGPU_TOLERANCE = 0.02; // relative to the largest logit; wrong kernels are off by more than that
const CACHE = "scratchgpt"; // not the library's, in which other pages may have their models
const MAX_INSPECTED_TOKENS = 1024, MAX_ATTENTION_TOKENS = 40;

let library, tokenizer, model, config, vocabulary, stopper, isClassifier, isChat, isByteLevel, contextLength;
let wantsAttention = false; // else its weights, many megabytes of a long text, are not copied
const unfinished = new Set(), refused = new Map(); // addresses of downloads; the latter with their HTTP status

// Fetch a file, remember it until it has arrived, and report the bytes.
async function download(url, options, report) {
    unfinished.add(url);
    const response = await fetch(url, options), total = Number(response.headers.get("content-length"));
    let loaded = 0;
    const transform = (chunk, output) => (report({ url, loaded: (loaded += chunk.length), total }), output.enqueue(chunk));
    const flush = () => void unfinished.delete(url);
    if (response.ok) return new Response(response.body.pipeThrough(new TransformStream({ transform, flush })), response);
    refused.set(url, response.status);
    unfinished.delete(url);
    return response;
}

const moduleURL = (source) => URL.createObjectURL(new Blob([source], { type: "text/javascript" }));

async function loadLibrary(runtime, report) {
    const [source, factory, wasmBinary] = await Promise.all([LIBRARY, ...RUNTIMES[runtime]].map(async ([path, integrity]) => {
        const response = await download(CDN + path, { integrity }, report); // a worker's import has no integrity
        if (!response.ok) throw new Error(response.url);
        return response.arrayBuffer();
    }));
    library = await import(moduleURL(source));
    const { env } = library, isProbe = (options) => options.headers.has("range"); // asks whether a file exists
    Object.assign(env.backends.onnx.wasm, { wasmBinary, wasmPaths: { mjs: moduleURL(factory) } });
    env.cacheKey = CACHE;
    env.useWasmCache = false; // the browser's cache has these files
    env.logLevel = library.LogLevel.ERROR;
    env.fetch = async (url, options) => {
        if (!isProbe(options)) return download(String(url), options, report);
        return fetch(url, options).catch((error) => (unfinished.add(String(url)), Promise.reject(error)));
    };
}

// Delete the files of other models and versions; in a private window there may be no cache.
async function forgetOthers(base) {
    const cache = await caches.open(CACHE);
    for (const request of await cache.keys()) if (!request.url.startsWith(base)) await cache.delete(request);
}

// Load a model and run it on a few tokens, which also shows errors that come with the first step only.
async function open(device, dtype) {
    const Model = isClassifier ? library.AutoModel : library.AutoModelForCausalLM;
    const session_options = { graphOptimizationLevel: dtype === "q8" ? "disabled" : "all" }; // convert has optimized q8
    const opened = await Model.from_pretrained("model", { config, device, dtype, session_options });
    const session = opened.sessions.model, run = session.run.bind(session);
    session.run = async (inputs) => {
        await nextTask(); // WebAssembly never yields by itself: "stop" would wait for the end
        return run(inputs, session.outputNames.filter((name) => wantsAttention || !name.startsWith("attentions")));
    };
    const probe = Array.from({ length: Math.min(PROBE_LENGTH, contextLength) }, (_, index) => index % config.vocab_size);
    return { opened, logits: (await opened(asInputs(probe))).logits.to("float32").data };
}

async function load({ base, useWebGPU }, report) {
    if (typeof WebAssembly !== "object") throw new Explained("This browser has no WebAssembly, which runs the model. " +
        "Use a current Firefox, Chrome, Edge or Safari, or allow WebAssembly for this page (Lockdown Mode disables it).");
    await loadLibrary(useWebGPU ? "webgpu" : "wasm", report);
    await forgetOthers(base).catch(() => {});
    const { origin, pathname } = new URL(base);
    Object.assign(library.env, { remoteHost: origin, remotePathTemplate: pathname.slice(1) });
    [config, tokenizer] = [await library.AutoConfig.from_pretrained("model"), await library.AutoTokenizer.from_pretrained("model")];
    isClassifier = config.architectures[0].endsWith("ForSequenceClassification");
    isChat = !isClassifier && Boolean(tokenizer.chat_template);
    contextLength = Math.min(config.max_position_embeddings ?? config.n_positions, tokenizer.model_max_length);
    isByteLevel = JSON.stringify(tokenizer._tokenizerJSON.decoder).includes("ByteLevel");
    vocabulary = [];
    for (const [token, id] of tokenizer.get_vocab()) vocabulary[id] = token;
    stopper = new library.InterruptableStoppingCriteria();
    const smallest = config["transformers.js_config"]?.dtype ?? "q8";
    // WebGPU computes 8-bit graphs silently wrong on many cards (transformers.js issues 1286, 1317, 1512, 1728).
    const dtype = useWebGPU && !smallest.startsWith("fp") ? "fp32" : smallest;
    const first = await open("wasm", dtype);
    model = first.opened;
    if (useWebGPU) {
        const second = await open("webgpu", dtype);
        if (!agree(first.logits, second.logits)) throw new Explained("it computes other logits.");
        await model.dispose();
        model = second.opened;
    }
    return describeModel(dtype, useWebGPU ? "WebGPU" : "WebAssembly");
}

function describeModel(dtype, engine) {
    const kind = isClassifier ? "classifier" : isChat ? "chat" : "completion";
    const layers = config.num_hidden_layers ?? config.n_layer, heads = config.num_attention_heads ?? config.n_head;
    const bits = { fp32: 32, fp16: 16 }[dtype] ?? 8;
    const facts = `${layers} layers with ${heads} heads each · context of ${count(contextLength)} tokens · ` +
        `vocabulary of ${count(config.vocab_size)} · ${bits}-bit weights in ${engine}`;
    const hasAttention = model.sessions.model.outputNames.includes("attentions.0");
    return { kind, facts, layers, heads, contextLength, hasAttention, generation: { ...model.generation_config } };
}

function agree(expected, actual) {
    const scale = expected.reduce((largest, value) => Math.max(largest, Math.abs(value)), 1);
    return expected.every((value, index) => Math.abs(value - actual[index]) <= WEBGPU_TOLERANCE * scale); // false for NaN
}

const count = (number) => number.toLocaleString("en");
const nextTask = () => new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel(); // setTimeout would wait for 4 ms
    port1.onmessage = () => (port1.close(), resolve());
    port2.postMessage(null);
});

function known(ids) {
    if (ids.includes(undefined)) throw new Explained("The text has characters that the tokenizer of this model does not know.");
    return ids;
}

// The text of a chat already has its special tokens, written by the chat template. An empty text becomes the BOS token.
function encode(text) {
    const ids = known(tokenizer(text, { add_special_tokens: !isChat, return_tensor: false }).input_ids);
    if (ids.length) return ids;
    if (tokenizer.bos_token_id === undefined) throw new Explained("Type something first: this model has no BOS token to start from.");
    return [tokenizer.bos_token_id];
}

function encodeTruncated(text) {
    const ids = encode(text), limit = Math.min(contextLength, MAX_INSPECTED_TOKENS);
    const cut = ids.length > limit ? ` Only the first ${count(limit)} are used.` : "";
    return { ids: ids.slice(0, limit), note: `${ids.length} tokens for ${[...text].length} characters.${cut}` };
}

function asInputs(ids) {
    const tensor = (values) => new library.Tensor("int64", BigInt64Array.from(values, BigInt), [1, ids.length]);
    return { input_ids: tensor(ids), attention_mask: tensor(ids.map(() => 1)) };
}

function decode(ids) {
    const clean_up_tokenization_spaces = tokenizer.config.clean_up_tokenization_spaces ?? false; // as in Python
    return ids.length ? tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces }) : "";
}

// Encode a conversation. Its oldest messages are dropped until there is room for an answer.
function encodeMessages(messages, maxNewTokens) {
    for (let dropped = 0; ; dropped += 2) {
        const options = { add_generation_prompt: true, return_tensor: false, return_dict: false };
        const ids = known(tokenizer.apply_chat_template(messages.slice(dropped), options));
        if (ids.length + maxNewTokens <= contextLength || dropped + 2 >= messages.length) return { ids, dropped };
    }
}

// Choose the token here, so that top-p and the seed count; the library's greedy search then takes the only one left.
function makeSampler(settings, report) {
    const generator = new library.random.Random(settings.seed);
    return (_, logits) => {
        const id = sample(logits.data, settings, generator.random());
        report(id);
        logits.data.fill(-Infinity).fill(0, id, id + 1);
        return logits;
    };
}

// Continue a text, or answer the last message of a conversation; report the text after each token.
async function generate({ text, messages, settings }, report) {
    const { ids, dropped = 0 } = messages ? encodeMessages(messages, settings.max_new_tokens) : { ids: encode(text) };
    if (ids.length >= contextLength) throw new Explained(`The text has ${count(ids.length)} tokens, but the context of the ` +
        `model holds ${count(contextLength)}: shorten it.`);
    const prompt = decode(ids).length, generated = [], start = performance.now();
    // Decoding all ids again keeps the spaces of SentencePiece and characters of several tokens.
    const soFar = () => ({
        text: decode([...ids, ...generated]).slice(prompt), count: generated.length, dropped,
        seconds: (performance.now() - start) / 1000, stopped: stopper.interrupted,
    });
    const sampler = makeSampler(settings, (id) => (generated.push(id), report(soFar())));
    stopper.reset();
    await model.generate({
        ...asInputs(ids),
        do_sample: false, num_beams: 1, repetition_penalty: settings.repetition_penalty,
        max_new_tokens: Math.min(settings.max_new_tokens, contextLength - ids.length),
        logits_processor: [sampler], stopping_criteria: stopper,
    });
    const result = soFar(), answered = [...(messages ?? []), { role: "assistant", content: result.text }];
    const whole = messages ? tokenizer.apply_chat_template(answered, { tokenize: false }) : text + result.text;
    return { ...result, whole };
}

// The score of each class in descending order, or the values that a regression model predicts in theirs.
async function classify({ text }) {
    if (!text.trim()) throw new Explained("Type something first.");
    const ids = encode(text), { problem_type, id2label } = config, isCut = ids.length > contextLength;
    const ending = isCut && tokenizer.all_special_ids.includes(ids.at(-1)) ? ids.slice(-1) : []; // kept, as in training
    const kept = isCut ? [...ids.slice(0, contextLength - ending.length), ...ending] : ids;
    const logits = [...(await model(asInputs(kept))).logits.to("float32").data];
    const isMultiLabel = problem_type === "multi_label_classification";
    const isRegression = problem_type === "regression" || (logits.length === 1 && !isMultiLabel);
    const sigmoid = (logit) => 1 / (1 + Math.exp(-logit));
    const scores = isRegression ? logits : isMultiLabel ? logits.map(sigmoid) : library.softmax(logits);
    const classes = scores.map((score, index) => ({ label: id2label?.[index] ?? `LABEL_${index}`, score }));
    if (!isRegression) classes.sort((a, b) => b.score - a.score);
    return { classes, isRegression, note: isCut ? `Only the first ${contextLength} of ${ids.length} tokens are read.` : "" };
}

// The bytes behind the characters of byte-level BPE: printable ones stand for themselves, the others follow from 256.
const BYTES = new Map();
for (let byte = 0, next = 256; byte < 256; byte++) {
    const isPrintable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    BYTES.set(String.fromCharCode(isPrintable ? byte : next++), byte);
}

// Decode UTF-8; bytes of incomplete characters become escape sequences.
function decodeBytes(bytes) {
    try {
        return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    } catch {
        return Array.from(bytes, (byte) => (byte < 128 ? String.fromCharCode(byte) : `\\x${byte.toString(16)}`)).join("");
    }
}

// A token in readable form: white space is marked, control characters are escape sequences.
function tokenName(id) {
    const token = vocabulary[id] ?? "(none)"; // the embedding may have more rows than the tokenizer has tokens
    const isBytes = isByteLevel && [...token].every((character) => BYTES.has(character));
    return (isBytes ? decodeBytes(Uint8Array.from(token, (character) => BYTES.get(character))) : token.replaceAll("▁", " "))
        .replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥")
        .replace(/[\p{C}\p{Z}]/gu, (character) => `\\u{${character.codePointAt(0).toString(16)}}`);
}

function tokens({ text }) {
    const { ids, note } = encodeTruncated(text), special = new Set(tokenizer.all_special_ids);
    return { note, tokens: ids.map((id) => ({ id, name: tokenName(id), isSpecial: special.has(id) })) };
}

async function next({ text, settings }) {
    const { ids } = encodeTruncated(text), penalty = settings.repetition_penalty;
    const logits = (await model(asInputs(ids))).logits.slice(null, -1, null).to("float32").data;
    for (const id of new Set(ids)) logits[id] = logits[id] < 0 ? logits[id] * penalty : logits[id] / penalty; // as `generate`
    const { rows, ...counts } = distribution(logits, settings, 20);
    return { rows: rows.map((row) => ({ ...row, name: tokenName(row.id) })), ...counts };
}

// The weights of one head. In a causal model, later tokens do not change those of the first.
async function attention({ text, layer, head }) {
    const { ids } = encodeTruncated(text), shown = ids.slice(0, MAX_ATTENTION_TOKENS), size = shown.length;
    wantsAttention = true;
    const outputs = await model(asInputs(shown)).finally(() => (wantsAttention = false));
    const all = outputs[`attentions.${layer}`].to("float32").data;
    const row = (_, index) => [...all.subarray((head * size + index) * size, (head * size + index) * size + index + 1)];
    return { names: shown.map(tokenName), weights: Array.from({ length: size }, row), total: ids.length };
}

class Explained extends Error {} // its message is meant for the visitor
// What happened and what to do, in plain sentences.
function explain(error) {
    const message = String(error?.message ?? error), isLost = /^\d+$/.test(message); // WebAssembly throws addresses
    if (error instanceof Explained) return message;
    const [url, status] = [...refused].find(([url]) => message.includes(url)) ?? [...unfinished];
    const file = url && decodeURIComponent(new URL(url).pathname.split("/").pop()), host = url && new URL(url).host;
    if (refused.has(url)) return `${file} from ${host} cannot be downloaded (HTTP ${status}): the model was moved, renamed or ` +
        "made private, or its server has a problem. Retry later, or ask whoever sent you the link.";
    if (isLost || /memory|alloc/i.test(message)) return "There is not enough memory for this model. Close other tabs, then retry.";
    if (url) return `${file} from ${host} cannot be downloaded. Check the connection, then retry: complete files are kept.`;
    if (!model) globalThis.caches?.delete(CACHE); // a file in it may be damaged
    return `The model cannot be run (${message.slice(0, 200)}). Retry, or use a current Firefox, Chrome, Edge or Safari.`;
}

const ACTIONS = { load: (...arguments_) => (loading = load(...arguments_)), generate, classify, tokens, next, attention };

let loading;

onmessage = async ({ data: { id, action, argument } }) => {
    if (action === "stop") return stopper?.interrupt();
    try {
        if (action !== "load") await loading; // a view may ask while another engine is loaded
        postMessage({ id, result: await ACTIONS[action](argument, (progress) => postMessage({ id, progress })) });
    } catch (error) {
        console.error(error);
        // After an error of the runtime, the library runs nothing more: the page starts another worker.
        postMessage({ id, error: explain(error), isBroken: !(error instanceof Explained) });
    }
};
