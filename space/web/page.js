// The page: everything that is shown. What a model writes is set as text, never as markup.
const $ = (id) => document.getElementById(id);
const TEXTS = { // labels of the text box, the button and the output
    chat: ["Message", "Send", "Conversation"],
    completion: ["Beginning of a text", "Continue", "Completion"],
    classifier: ["Text", "Classify", "Classes"],
};
const isTouch = matchMedia("(pointer: coarse)").matches && !matchMedia("(any-pointer: fine)").matches; // without Shift+Enter
const DEFAULTS = { temperature: 1, top_k: 50, top_p: 1, repetition_penalty: 1, max_new_tokens: 128 };
let kind = "", conversation = [], isRunning = false, numInspections = 0;

function element(tag, properties, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
}

// ---- The worker ----
let worker, numMessages = 0;
const pending = new Map();

// Only a worker from a blob inherits the content security policy of this page.
function startWorker() {
    worker?.terminate();
    pending.forEach(({ reject }) => reject(new Error("The model was loaded again.")));
    pending.clear();
    const source = `import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`;
    worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })), { type: "module" });
    worker.onmessage = ({ data: { id, progress, result, error, isBroken } }) => {
        const { resolve, reject, report } = pending.get(id) ?? {}; // progress may arrive after an error
        if (progress) return report?.(progress);
        pending.delete(id);
        if (isBroken) fail(error);
        return error ? reject(new Error(error)) : resolve(result);
    };
    const error = new Error("A part of this page cannot be loaded. Check the connection, then retry.");
    worker.onerror = () => pending.forEach(({ reject }) => reject(error));
    return worker;
}

function ask(action, argument, report) {
    return new Promise((resolve, reject) => {
        pending.set(++numMessages, { resolve, reject, report });
        worker.postMessage({ id: numMessages, action, argument });
    });
}

// ---- Loading ----
// model.json names the model: {"model": "USER/NAME", or "." on this server, "revision": its commit, "path": "web" or ""}. With
// the revision in its address, the browser keeps a file, and still notices another version.
async function locateModel() {
    const response = await fetch("model.json", { cache: "no-cache" }).catch(() => ({ status: "no answer" }));
    if (!response.ok) throw new Error(`model.json cannot be read (${response.status}). Check the connection, then retry.`);
    const { model, revision, path, name = "Model" } = (await response.json().catch(() => null)) ?? {};
    if (!model || !revision) throw new Error("model.json names no model: upload the page again with hub_upload.py.");
    const folder = path ? `${path}/` : "";
    if (model === ".") return { name, base: new URL(`model/${revision}/${folder}`, location.href).href };
    return { name: model, base: `https://huggingface.co/${model}/resolve/${revision}/${folder}` };
}

function makeProgress() {
    const files = new Map(), start = performance.now();
    const sum = (field) => [...files.values()].reduce((sum, file) => sum + file[field], 0);
    return ({ url, loaded, total }) => {
        files.set(url, { loaded, total: Math.max(loaded, total) });
        $("progress").value = sum("loaded") / sum("total");
        const stage = `Loading: ${Math.round(sum("loaded") / 1e6)} of ${Math.round(sum("total") / 1e6)} MB`;
        // A screen reader reads out each change: none that takes no time, and none to the same text.
        if (performance.now() - start > 300 && $("stage").textContent !== stage) $("stage").textContent = stage;
    };
}

async function load() {
    const useWebGPU = $("engine").value === "WebGPU";
    $("main").hidden = $("retry").hidden = true;
    $("loading").hidden = $("progress").hidden = false;
    $("progress").removeAttribute("value");
    $("stage").textContent = "Loading the model into this browser. What you type stays here.";
    let own = worker;
    try {
        const { name, base } = await locateModel();
        own = startWorker(); // and ask it at once: an error that it has before it is asked would be lost
        $("name").textContent = name.split("/").pop();
        showModel(await ask("load", { base, useWebGPU }, makeProgress()));
        document.title = $("name").textContent;
    } catch (error) {
        if (worker !== own) return; // another engine was chosen meanwhile
        if (!useWebGPU) return fail(error.message);
        $("engine").value = "WebAssembly";
        await load();
        $("note").textContent = `WebAssembly runs this model. With WebGPU: ${error.message}`;
    }
}

function fail(message) {
    document.title = $("stage").textContent = message;
    $("progress").hidden = true;
    $("loading").hidden = $("retry").hidden = false;
    $("retry").focus();
}

function showModel(model) {
    if (!kind) build(model);
    $("facts").textContent = model.facts;
    $("note").textContent = "";
    $("loading").hidden = true;
    $("main").hidden = false;
    $("text").focus({ preventScroll: true });
    inspect();
}

function build(model) {
    kind = model.kind;
    const [label, button, ariaLabel] = TEXTS[kind];
    [$("text-label").textContent, $("run").textContent] = [label, button];
    $("output").className = kind;
    $("output").ariaLabel = ariaLabel;
    if (kind === "chat") $("prompt").before($("output"));
    $("settings").hidden = $("next").hidden = kind === "classifier";
    $("settings").open = matchMedia("(min-width: 56rem)").matches;
    $("attention").hidden = !model.hasAttention;
    $("hint").hidden = isTouch;
    for (const [id, size] of [["layer", model.layers], ["head", model.heads]])
        $(id).append(...Array.from({ length: size }, (_, index) => element("option", {}, index)));
    for (const [name, value] of Object.entries(DEFAULTS)) {
        const slider = $("sampling").elements[name], chosen = model.generation[name] ?? value;
        slider.max = name === "max_new_tokens" ? model.contextLength : Math.max(slider.max, chosen);
        slider.value = name === "temperature" && !model.generation.do_sample ? 0 : chosen;
        showValue(slider);
    }
}

// ---- Chat, completion, classification ----
const showValue = (slider) => (slider.previousElementSibling.querySelector("b").textContent = slider.value);

function readSettings() {
    const { seed, ...sliders } = Object.fromEntries(new FormData($("sampling")));
    const settings = Object.fromEntries(Object.entries(sliders).map(([name, value]) => [name, Number(value)]));
    return { ...settings, seed: seed ? Number(seed) : crypto.getRandomValues(new Uint32Array(1))[0] };
}

async function run() {
    if (isRunning) return worker.postMessage({ action: "stop" });
    isRunning = true;
    $("note").textContent = "";
    $("output").ariaBusy = "true"; // a screen reader reads the text when it is complete
    if (kind !== "classifier") $("run").textContent = "Stop";
    const action = kind === "classifier" ? classify : generate;
    await action($("text").value).catch((error) => ($("note").textContent = error.message));
    isRunning = false;
    $("run").textContent = TEXTS[kind][1];
    $("output").ariaBusy = "false";
    inspect();
}

async function generate(text) {
    const isChat = kind === "chat", output = $("output"), settings = readSettings();
    if (isChat && !text.trim()) throw new Error("Type something first.");
    const messages = isChat ? [...conversation, { role: "user", content: text }] : null;
    const prompt = element(isChat ? "p" : "span", { className: "prompt" }, text), written = prompt.cloneNode();
    written.className = "written";
    if (!isChat) output.replaceChildren();
    output.append(prompt, written);
    const write = ({ text }) => {
        written.textContent = text.replace(/\uFFFD+$/, ""); // the bytes of a character may be several tokens
        output.scrollTop = output.scrollHeight;
    };
    if (isChat) $("text").value = "";
    try {
        const result = await ask("generate", { text, messages, settings }, write);
        if (!written.isConnected) return; // cleared meanwhile
        written.textContent = result.text;
        if (isChat) conversation = [...messages, { role: "assistant", content: result.text }];
        $("inspected").value = result.whole;
        $("note").textContent = describe(result, settings);
    } catch (error) {
        for (const node of [prompt, written]) node.remove();
        $("text").value ||= text;
        throw error;
    }
}

function describe({ count, seconds, dropped, stopped }, { temperature, seed }) {
    return `${count} tokens in ${seconds.toFixed(1)} seconds (${Math.round(count / seconds)} tokens/s)` +
        (temperature ? `, seed ${seed}` : "") + (stopped ? ", stopped" : "") +
        (dropped ? `; the first ${dropped} messages no longer fit in the context` : "");
}

async function classify(text) {
    const { classes, isRegression, note } = await ask("classify", { text });
    const rows = classes.map(({ label, score }) => ({ cells: [label], value: score }));
    $("output").replaceChildren(bars(rows, rows.length, !isRegression));
    $("note").textContent = note;
    $("inspected").value = text;
}

function clear() {
    worker.postMessage({ action: "stop" });
    conversation = [];
    $("output").replaceChildren();
    $("note").textContent = $("text").value = "";
    $("text").focus();
}

// ---- Look inside ----
const paragraph = (text) => element("p", { className: "quiet" }, text);
const tableRow = ([head, ...cells]) =>
    element("tr", {}, element("th", { scope: "row" }, head), ...cells.map((cell) => element("td", {}, cell)));

function bars(rows, numKept, areShares = true) {
    return element("table", { className: "bars" }, ...rows.map(({ cells, value }, index) => {
        const bar = element("i"), row = tableRow([...cells, areShares ? `${(100 * value).toFixed(2)}%` : value.toFixed(4)]);
        bar.style.width = areShares ? `${100 * value}%` : 0;
        row.append(element("td", { className: "bar", ariaHidden: "true" }, bar));
        row.classList.toggle("out", index >= numKept);
        return row;
    }));
}

const VIEWS = {
    async tokens(text) {
        const { tokens, note } = await ask("tokens", { text });
        const item = ({ name, id, isSpecial }) =>
            element("li", { className: isSpecial ? "special" : "" }, element("b", {}, name), element("small", {}, id));
        return [paragraph(note), element("ol", {}, ...tokens.map(item))];
    },
    async next(text) {
        const settings = readSettings(), { rows, kept, size } = await ask("next", { text, settings });
        const shown = rows.map(({ name, id, probability }) => ({ cells: [name, id], value: probability }));
        const note = settings.temperature
            ? `${kept} of ${size} tokens can be sampled at temperature ${settings.temperature}; the others are pale.`
            : "At temperature 0 the most likely token is taken; the probabilities are those at temperature 1.";
        return [paragraph(note), bars(shown, kept)];
    },
    async attention(text) {
        const { names, weights, total } = await ask("attention", { text, layer: $("layer").value, head: $("head").value });
        const note = "Each row shows how a token divides its attention between itself and the tokens before it." +
            (names.length < total ? ` Only the first ${names.length} of ${total} tokens are shown.` : "");
        const cell = (row) => (weight, column) => {
            const title = `${names[row]} attends to ${names[column]}: ${(100 * weight).toFixed(2)}%`;
            const node = element("td", { title }, `${Math.round(100 * weight)}%`); // for screen readers only
            node.style.setProperty("--weight", `${100 * Math.sqrt(weight)}%`); // the root makes small weights visible
            return node;
        };
        const head = (name) => element("th", { scope: "col" }, element("span", {}, name));
        const row = (values, index) => element("tr", {}, element("th", { scope: "row" }, names[index]), ...values.map(cell(index)));
        const table = element("table", {}, element("tr", {}, element("td"), ...names.map(head)), ...weights.map(row));
        return [paragraph(note), table];
    },
};

// Update the open views, and again after a change meanwhile; the worker has one of these requests at a time.
async function inspect() {
    if (++numInspections > 1) return;
    for (let number = 0; number < numInspections; ) {
        number = numInspections;
        for (const [name, view] of Object.entries(VIEWS)) {
            if (!$(name).open || $(name).hidden || number < numInspections) continue;
            const content = await view($("inspected").value).catch((error) => [paragraph(error.message)]);
            if (number === numInspections) $(name).lastElementChild.replaceChildren(...content);
        }
    }
    numInspections = 0;
}

// ---- Events ----
const on = (id, type, action) => $(id).addEventListener(type, action);
on("prompt", "submit", (event) => (event.preventDefault(), run()));
on("text", "keydown", (event) => {
    const isComposing = event.isComposing || event.keyCode === 229; // an input method's Enter ends a word; 229 in Safari
    if (event.key !== "Enter" || event.shiftKey || isComposing || isTouch) return;
    event.preventDefault();
    if (!isRunning) run();
});
on("clear", "click", clear);
on("retry", "click", load);
on("engine", "change", load);
on("inspected", "input", inspect);
on("sampling", "submit", (event) => event.preventDefault());
on("sampling", "input", ({ target }) => (target.type === "range" && showValue(target), inspect()));
on("attention", "change", inspect);
on("attention", "click", ({ target }) => target.title && ($("attention").querySelector(".quiet").textContent = target.title));
for (const id of Object.keys(VIEWS)) on(id, "toggle", inspect);
navigator.gpu?.requestAdapter().then((adapter) => ($("engine-label").hidden = !adapter));
load();
