// Drives the page in headless Chromium and prints what it has seen: node page_driver.mjs NODE_MODULES CHROMIUM ADDRESSES.json
// Its CDN is a server on this machine (addresses.cdn); the page, its policy and the hashes are unchanged.
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";

const [modules, executablePath, file] = process.argv.slice(2);
const { chromium } = createRequire(`${modules}/`)("playwright-core");
const addresses = JSON.parse(await readFile(file));
const FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--ignore-certificate-errors",
    `--host-resolver-rules=MAP cdn.jsdelivr.net ${addresses.cdn}, MAP example.com ${addresses.cdn}`];
const HOSTILE = '<img src=x onerror="ran=1"><script>ran=1</script>';
const TEXT = "to be, naïve 🙂";
const results = { hosts: new Set(), errors: [] };

async function openPage(browser, address, { width = 1280, colorScheme = "light", prelude, routes = {}, hasTouch = false } = {}) {
    const context = await browser.newContext({ viewport: { width, height: 844 }, colorScheme, hasTouch, isMobile: hasTouch });
    if (prelude) await context.route("**/worker.js", async (route) => {
        const response = await route.fetch();
        await route.fulfill({ response, body: prelude + (await response.text()) });
    });
    for (const [path, route] of Object.entries(routes)) await context.route(path, route);
    const page = await context.newPage();
    page.setDefaultTimeout(20000);
    page.on("request", (request) => results.hosts.add(new URL(request.url()).hostname));
    page.on("pageerror", (error) => results.errors.push(String(error)));
    await page.goto(address);
    await page.locator("#main, #retry").filter({ visible: true }).first().waitFor();
    return page;
}

const set = (page, name, value) => page.locator(`[name=${name}]`).fill(String(value));
const note = (page, text) => page.locator("#note").getByText(text).innerText();
const inner = (page, selector) => page.locator(selector).allInnerTexts();

async function run(page, text, expected = /tokens in/) {
    await page.locator("#text").fill(text);
    await page.locator("#text").press("Enter");
    return note(page, expected);
}

// Wait until all views show the results for the text.
async function inspect(page, text, number) {
    await page.locator("#inspected").fill(text);
    await page.locator("#tokens p").getByText(`for ${[...text].length} characters.`).waitFor();
    if (number) await page.waitForFunction((number) => document.querySelectorAll(".map td[title]").length === number, number);
}

async function completion(browser) {
    const page = await openPage(browser, addresses.completion);
    const seen = { facts: await page.locator("#facts").innerText(), policy: {} };
    await page.evaluate(() => {
        window.lengths = new Set();
        const record = () => lengths.add(document.querySelector("#output").textContent.length);
        new MutationObserver(record).observe(document.querySelector("#output"), { subtree: true, childList: true });
    });
    await set(page, "temperature", 0);
    seen.note = await run(page, "to be");
    seen.written = await page.locator("#output").textContent();
    seen.lengths = await page.evaluate("lengths.size");
    seen.inspected = await page.locator("#inspected").inputValue();
    await set(page, "repetition_penalty", 1.5);
    await run(page, "to be");
    seen.penalized = await page.locator("#output").textContent();
    await set(page, "repetition_penalty", 1);
    await set(page, "temperature", 1);
    await set(page, "top_k", 0);
    seen.sampled = [];
    for (const seed of [1, 1, 2]) {
        await set(page, "seed", seed);
        await run(page, "to be", `seed ${seed}`);
        seen.sampled.push(await page.locator("#output").textContent());
    }
    await run(page, "שלום", "seed 2");
    seen.margin = await page.locator(".prompt").evaluate((node) => // of a text that is written from right to left
        node.parentElement.getBoundingClientRect().right - node.getClientRects()[0].right);
    await run(page, HOSTILE);
    seen.hostile = { expected: HOSTILE, shown: await page.locator("#output").textContent() };
    await set(page, "top_k", 5);
    await set(page, "temperature", 0.53);
    await set(page, "repetition_penalty", 1.57);
    await page.locator("#next summary").click();
    await page.locator("#attention summary").click();
    await page.locator("#layer").selectOption("1");
    await page.locator("#head").selectOption("2");
    await page.locator("#next p").getByText("5 of").waitFor();
    await inspect(page, HOSTILE);
    seen.hostile.tokens = (await inner(page, "#tokens b")).join("");
    await inspect(page, TEXT, addresses.cells);
    seen.ids = (await inner(page, "#tokens small")).map(Number);
    seen.names = await inner(page, "#tokens b");
    seen.next = await page.locator("#next tr").evaluateAll((rows) => rows.map((row) => [...row.cells].map((cell) => cell.textContent)));
    seen.pale = await page.locator("#next .out").count();
    seen.attention = await page.locator(".map td[title]").evaluateAll((cells) => cells.map((cell) => cell.title));
    seen.hostile.ran = await page.evaluate("window.ran ?? null");
    seen.tooLong = await run(page, "?".repeat(70), /shorten it/);
    const fetched = (address) => fetch(address).then(() => "allowed", () => "blocked");
    const elsewhere = "https://example.com/npm/playwright-core@1/package.json", blank = await page.context().newPage();
    seen.policy.without = await blank.evaluate(fetched, elsewhere);
    seen.policy.worker = await page.workers()[0].evaluate(fetched, elsewhere);
    seen.policy.page = await page.evaluate(fetched, elsewhere);
    seen.policy.hub = await page.content().then((html) => html.match(/connect-src[^"]*/)[0].split(/\s+/).slice(1));
    await page.evaluate("document.activeElement.blur()");
    seen.focus = [];
    for (let step = 0; step < 20; step++) {
        await page.keyboard.press("Tab");
        seen.focus.push(await page.evaluate("document.activeElement.id || document.activeElement.name || document.activeElement.textContent"));
    }
    seen.unnamed = await page.locator("textarea, input, select, button").evaluateAll((nodes) => nodes
        .filter((node) => !(node.tagName === "BUTTON" ? node : node.labels[0])?.textContent.trim()).map((node) => node.outerHTML));
    return seen;
}

async function chat(browser) {
    const page = await openPage(browser, addresses.chat, { width: 390, colorScheme: "dark" });
    const seen = { focused: await page.evaluate("document.activeElement.id"), open: await page.locator("#settings").getAttribute("open") };
    seen.facts = await page.locator("#facts").innerText();
    await page.keyboard.type("to be?");
    await page.keyboard.press("Enter");
    await note(page, /tokens in/);
    seen.messages = await inner(page, "#output p");
    seen.inspected = await page.locator("#inspected").inputValue();
    seen.background = await page.evaluate("getComputedStyle(document.body).backgroundColor");
    for (let count = 0; count < 2; count++) await run(page, "to be or not to be?");
    seen.dropped = await page.locator("#note").innerText();
    await page.locator("#inspected").fill("to be or not to be, ".repeat(6) + "x".repeat(30));
    await page.locator("#attention summary").click();
    await page.locator(".map td[title]").nth(819).waitFor();
    seen.width = await page.evaluate("document.documentElement.scrollWidth");
    await page.locator("#clear").click();
    await page.locator("#settings summary").click();
    await set(page, "temperature", 0);
    await set(page, "max_new_tokens", 50);
    await page.locator("#text").fill("to be?");
    await page.evaluate(() => { // Stop as soon as the first token is there
        const stop = () => document.querySelector(".written")?.textContent && document.querySelector("#run").click();
        new MutationObserver((_, observer) => stop() ?? observer.disconnect()).observe(
            document.querySelector("#output"), { subtree: true, childList: true });
    });
    await page.locator("#run").click();
    seen.stopped = await note(page, /tokens? in/);
    await page.locator("#clear").click();
    seen.cleared = (await inner(page, "#output p")).length;
    const phone = await openPage(browser, addresses.chat, { width: 390, hasTouch: true });
    await phone.locator("#text").pressSequentially("to\nbe");
    seen.typed = await phone.locator("#text").inputValue();
    seen.hints = await phone.locator("#hint:visible").count();
    return seen;
}

// A tokenizer of characters, of which it does not know all.
async function characters(browser) {
    const page = await openPage(browser, addresses.characters), seen = {};
    await set(page, "temperature", 0);
    await run(page, "to be\n");
    seen.written = await page.locator("#output").textContent();
    seen.unknown = await run(page, "é", /does not know/);
    await inspect(page, "to be\n");
    seen.ids = (await inner(page, "#tokens small")).map(Number);
    return seen;
}

// A model that always writes HOSTILE; its tokenizer has a token without an embedding.
async function markup(browser) {
    const page = await openPage(browser, addresses.markup), seen = {};
    await run(page, "to be");
    seen.shown = await page.locator("#output").textContent();
    seen.images = await page.locator("#output img").count();
    seen.ran = await page.evaluate("window.ran ?? null");
    await page.locator("#text").fill("<beyond>");
    await page.locator("#run").click();
    await page.locator("#retry").waitFor();
    seen.broken = await page.locator("#stage").innerText();
    seen.text = await page.locator("#text").inputValue();
    await page.locator("#retry").click();
    await page.locator("#retry").waitFor({ state: "hidden" });
    await page.locator("#main").waitFor();
    await run(page, "to be");
    seen.again = await page.locator("#output").textContent();
    return seen;
}

const classifier = (kind) => async (browser) => {
    const page = await openPage(browser, addresses[kind]);
    const seen = { empty: await run(page, " ", "Type something first.") };
    await page.locator("#text").fill(TEXT);
    await page.locator("#run").click();
    await page.locator("#output tr").first().waitFor();
    seen.rows = await page.locator("#output tr").evaluateAll((rows) => rows.map((row) => [...row.cells].map((cell) => cell.textContent)));
    seen.visible = await inner(page, "summary:visible");
    return seen;
};

async function failures(browser) {
    const seen = {};
    const missing = await openPage(browser, addresses.missing);
    seen.missing = await missing.locator("#stage").innerText();
    const without = await openPage(browser, addresses.chat, { prelude: "delete globalThis.WebAssembly;" });
    seen.withoutWebAssembly = await without.locator("#stage").innerText();
    const page = await openPage(browser, addresses.cut); // the server cuts this file once
    seen.cut = await page.locator("#stage").innerText();
    seen.focused = await page.evaluate("document.activeElement.id");
    await page.keyboard.press("Enter");
    await page.locator("#main").waitFor();
    seen.recovered = await page.locator("#facts").innerText();
    await page.evaluate(async () => { // A file in the browser's cache is damaged; another is of an earlier version
        const cache = await caches.open("scratchgpt"), files = await cache.keys();
        await cache.put(files.find(({ url }) => url.endsWith(".onnx")), new Response("half"));
        await cache.put(new URL("model/old/onnx/model.onnx", location.href), new Response("old"));
    });
    await page.reload();
    await page.locator("#retry").waitFor();
    seen.damaged = await page.locator("#stage").innerText();
    await page.locator("#retry").click();
    await page.locator("#main").waitFor();
    seen.again = await page.locator("#facts").innerText();
    seen.kept = await page.evaluate(async () => (await (await caches.open("scratchgpt")).keys()).map(({ url }) => url));
    const late = (route) => setTimeout(() => route.continue(), 500); // the worker fails before the model is known
    const routes = { "**/worker.js": (route) => route.abort(), "**/model.json": late };
    seen.withoutWorker = await (await openPage(browser, addresses.chat, { routes })).locator("#stage").innerText();
    const unnamed = { "**/model.json": (route) => route.fulfill({ body: "{}" }) };
    seen.unnamed = await (await openPage(browser, addresses.chat, { routes: unnamed })).locator("#stage").innerText();
    return seen;
}

// With WebGPU computed by the CPU; with WebGPU that seems to compute something else; without WebGPU.
async function webgpu(browser) {
    const args = [...FLAGS.filter((flag) => flag !== "--disable-gpu"), "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"];
    const withGPU = await chromium.launch({ executablePath, args });
    const distrust = async (route) => {
        const response = await route.fetch();
        await route.fulfill({ response, body: (await response.text()).replace("WEBGPU_TOLERANCE = 0.02", "WEBGPU_TOLERANCE = -1") });
    };
    const pages = {
        right: await openPage(withGPU, addresses.completion),
        wrong: await openPage(withGPU, addresses.completion, { routes: { "**/worker.js": distrust } }),
        missing: await openPage(browser, addresses.completion),
    };
    const seen = {};
    for (const [name, page] of Object.entries(pages)) {
        const label = page.locator("#engine-label");
        seen[name] = { isOffered: await label.isVisible() };
        await label.evaluate((node) => (node.hidden = false));
        if (name === "missing") await page.locator("#text").press("Enter"); // is still running when the model is loaded again
        await page.locator("#engine").selectOption("WebGPU");
        await page.locator("#facts").getByText(name === "right" ? "WebGPU" : "WebAssembly").waitFor();
        await page.locator("#main").waitFor();
        if (name !== "right") seen[name].note = await note(page, /WebAssembly runs this model/);
        await set(page, "temperature", 0);
        await run(page, "to be");
        seen[name].written = await page.locator("#output").textContent();
        seen[name].engine = await page.locator("#engine").inputValue();
    }
    await withGPU.close();
    return seen;
}

async function speed(browser) {
    const page = await openPage(browser, addresses.speed), start = await page.evaluate("performance.timeOrigin");
    const seen = { ready: Date.now() - start };
    await set(page, "max_new_tokens", 200);
    await page.locator("#text").fill("to be");
    await page.locator("#run").click();
    await page.waitForFunction(() => document.querySelector(".written")?.textContent);
    return { ...seen, firstToken: Date.now() - start, facts: await page.locator("#facts").innerText(), note: await note(page, /tokens in/) };
}

const browser = await chromium.launch({ executablePath, args: FLAGS });
const classifiers = ["classifier", "regression", "multi_label_classification"].map((kind) => [kind, classifier(kind)]);
const scenarios = { completion, chat, markup, characters, webgpu, ...Object.fromEntries(classifiers), failures, speed };
for (const name of addresses.scenarios) results[name] = await scenarios[name](browser);
await browser.close();
console.log(JSON.stringify({ ...results, hosts: [...results.hosts] }));
