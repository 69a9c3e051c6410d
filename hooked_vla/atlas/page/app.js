/* The shell of the page: addresses, data, shared widgets. Classic scripts, no modules: a copy opens from file://.

A view file says    atlas.view("episodes", {title: "Episodes", key: "e", show, hide, update, keys})
  show(el, parts, params)   draws into an empty element; parts: ["run", "12"] and params: {step: "3"} of
                            #/episodes/run/12?step=3. May be async; what it throws is shown to the reader.
  hide()                    optional: the view is left. update(parts, params): optional: true if a change of address
                            within the view was dealt with without drawing all anew. keys(event): optional: true if
                            it dealt with a key.
Data      atlas.get(path, query) -> Promise of JSON; atlas.url(path) of media; atlas.has(path); atlas.live: a server
          answers (queries, posts); atlas.post(path, body); atlas.events(path, each, ended) -> close().
Address   atlas.go(view, parts, params); atlas.replace(parts, params): says where we are, draws nothing;
          atlas.link(view, parts, params) -> "#/...".
Widgets   atlas.h(tag, attributes, ...children): attributes class, text, on: {click: f}, data: {}, or any other;
          children are nodes or text, and text is never read as HTML. atlas.s: the same for SVG.
          table({caption, columns: [{name, title, number, cell(row)}], rows, file}), plot(el, data, layout, {label,
          config}) -> Promise, badge(kind, text), empty(title, text), choose({label, options, value, change}),
          search({label, value, change}), number(x), interval(low, high), source(file), arrows(el, selector),
          status(text), colour(name), shade(value, low, high, diverging) -> {background, color}.
Plots     heat maps and SVG scatter: the policy of the page forbids what WebGL traces need. */
"use strict";
(() => {
  const about = JSON.parse(document.querySelector('meta[name="atlas"]').content);
  const held = window.atlasPaths ? new Set(window.atlasPaths) : null;
  const views = new Map(), known = new Map(), waiting = new Map();
  const byId = (id) => document.getElementById(id);
  let current = null, drawn = 0;

  /* data */
  const encoded = (path) => path.split("/").map(encodeURIComponent).join("/");
  function get(path, query) {
    const asked = query && new URLSearchParams(Object.entries(query).filter(([, v]) => v !== "" && v != null));
    const address = asked && asked.size ? `${encoded(path)}?${asked}` : encoded(path);
    if (!known.has(address)) {
      const answer = about.live ? fetched(`api/${address}`) : scripted(path, asked && asked.size > 0);
      known.set(address, answer);
      // what failed may be tried again; answers to queries are not kept
      answer.then(() => asked && known.delete(address), () => known.delete(address));
    }
    return known.get(address);
  }
  async function fetched(address, options) {
    let answer;
    try {
      answer = await fetch(address, options);
    } catch {
      throw new Error("The server does not answer: is `hooked-vla atlas` still running?");
    }
    const said = await answer.json().catch(() => ({ error: `the server answered with ${answer.status}` }));
    if (!answer.ok) throw new Error(said.error || `the server answered with ${answer.status}`);
    return said;
  }
  function scripted(path, asked) {
    if (asked || !has(path)) return Promise.reject(new Error("This copy of the page does not hold that."));
    return new Promise((resolve, reject) => {
      waiting.set(path, (value) => (value && value.__error ? reject(new Error(value.__error)) : resolve(value)));
      const script = h("script", { src: `data/${encoded(path)}.js` });
      script.onerror = () => reject(new Error(`data/${path}.js of this copy cannot be read.`));
      script.onload = () => script.remove();
      document.head.append(script);
    });
  }
  function receive(path, value) {
    const take = waiting.get(path);
    waiting.delete(path);
    if (take) take(value);
  }
  const has = (path) => held === null || held.has(path);
  function url(path, suffix) {
    return about.live ? `api/${encoded(path)}` : `data/${encoded(path)}.${suffix || "png"}`;
  }
  const post = (path, body) => fetched(`api/${encoded(path)}`, {
    method: "POST", headers: { "content-type": "application/json", "x-atlas-token": about.token },
    body: JSON.stringify(body || {}),
  });
  function events(path, each, ended) {
    const stream = new EventSource(`api/${encoded(path)}`);
    stream.onmessage = (event) => each(JSON.parse(event.data));
    stream.onerror = () => { stream.close(); if (ended) ended(); };
    return () => stream.close();
  }

  /* elements */
  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value == null || value === false) continue;
      if (name === "text") node.textContent = value;
      else if (name === "class") node.setAttribute("class", value);
      else if (name === "style") Object.assign(node.style, value);
      else if (name === "data") Object.assign(node.dataset, value);
      else if (name === "on") for (const [event, run] of Object.entries(value)) node.addEventListener(event, run);
      else node.setAttribute(name, value === true ? "" : value);
    }
    for (const child of children.flat(Infinity)) {
      if (child != null && child !== false) node.append(child instanceof Node ? child : String(child));
    }
    return node;
  }
  const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const s = (tag, attributes, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  /* numbers */
  function number(value) {
    if (value == null || value === "") return "";
    if (typeof value === "boolean") return value ? "yes" : "no";
    if (typeof value !== "number") return String(value);
    if (Number.isInteger(value) && Math.abs(value) < 1e7) return String(value);
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(1) : String(Number(value.toPrecision(3)));
  }
  const interval = (low, high) => (low == null || high == null ? "" : `${number(low)} to ${number(high)}`);

  /* colours */
  const VIRIDIS = ["#440154", "#472c7a", "#3b518b", "#2c718e", "#21908d", "#27ad81", "#5cc863", "#aadc32", "#fde725"];
  const RDBU = ["#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#b2182b"];
  const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  function luminance(colour) {
    const [r, g, b] = colour.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  function shade(value, low, high, diverging) {
    const scale = diverging ? RDBU : VIRIDIS;
    const place = high > low ? Math.min(1, Math.max(0, (value - low) / (high - low))) * (scale.length - 1) : 0;
    const at = Math.min(scale.length - 2, Math.floor(place)), part = place - at;
    const [from, to] = [rgb(scale[at]), rgb(scale[at + 1])];
    const mixed = from.map((c, i) => Math.round(c + (to[i] - c) * part));
    // white on what is darker than the grey on which both read equally well
    return { background: `rgb(${mixed.join(" ")})`, color: luminance(mixed) < 0.179 ? "#fff" : "#000" };
  }
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const OKABE_ITO = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#999999"];

  /* widgets */
  function table({ caption, columns, rows, file, label }) {
    const head = columns.map((c) => h("th", { scope: "col", class: c.number ? "number" : null }, c.title || c.name));
    const body = rows.map((row) => h("tr", {}, columns.map((c) => {
      const value = c.cell ? c.cell(row) : row[c.name];
      const cell = h("td", { class: c.number || typeof value === "number" ? "number" : null },
        value instanceof Node || Array.isArray(value) ? value : number(value));
      return cell;
    })));
    const element = h("table", {}, h("caption", {}, caption, file ? [" ", source(file)] : null),
      h("thead", {}, h("tr", {}, head)), h("tbody", {}, body));
    // a table that is wider than the page scrolls by itself, with the keyboard too
    return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label || String(caption) }, element);
  }
  const source = (file) => h("span", { class: "source" }, "from ", h("code", {}, file));
  const badge = (kind, text) => h("span", { class: `badge badge-${kind.replace(/[^a-z]+/g, "-")}` }, text || kind);
  const empty = (title, text) => h("div", { class: "empty" }, h("h2", {}, title), text ? h("p", {}, text) : null);
  let labelled = 0;
  function choose({ label, options, value, change }) {
    const id = `choose-${++labelled}`;
    const select = h("select", { id, on: { change: () => change(select.value) } }, options.map((option) => {
      const [key, text] = Array.isArray(option) ? option : [option, option];
      return h("option", { value: key, selected: key === value }, text);
    }));
    return h("span", { class: "field" }, h("label", { for: id }, label), select);
  }
  function search({ label, value, change }) {
    const id = `search-${++labelled}`;
    let later = 0;
    const input = h("input", { id, type: "search", value: value || "", data: { search: "" }, autocomplete: "off", on: {
      input: () => { clearTimeout(later); later = setTimeout(() => change(input.value), 200); },
    } });
    return h("span", { class: "field" }, h("label", { for: id }, label), input);
  }
  /* Plotly is large: it is read when the first plot is drawn. */
  let library = null;
  function plotly() {
    library = library || new Promise((resolve, reject) => {
      const script = h("script", { src: "plotly.min.js" });
      script.onload = resolve;
      script.onerror = () => { library = null; reject(new Error("plotly.min.js cannot be read.")); };
      document.head.append(script);
    });
    return library;
  }
  async function plot(el, data, layout, { label, config } = {}) {
    const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line") };
    const own = layout || {}, merged = { ...own };
    for (const name of new Set(["xaxis", "yaxis", ...Object.keys(own).filter((key) => /^[xy]axis/.test(key))])) {
      merged[name] = { automargin: true, ...axis, ...own[name] };
    }
    el.classList.add("plot");
    el.setAttribute("role", "img");
    if (label) el.setAttribute("aria-label", label);
    await plotly();
    return Plotly.react(el, data, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: OKABE_ITO, hovermode: "closest",
      font: { family: "system-ui, sans-serif", size: 12, color: colour("ink") },
      margin: { l: 48, r: 16, t: own.title ? 40 : 16, b: 40 }, ...merged,
    }, { responsive: true, displaylogo: false, displayModeBar: false, ...config });
  }
  function arrows(el, selector) {
    el.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
      const items = [...el.querySelectorAll(selector)], at = items.indexOf(document.activeElement);
      if (step === undefined || at < 0) return;
      event.preventDefault();
      items[Math.min(items.length - 1, Math.max(0, at + step))].focus();
    });
  }
  const status = (text) => { byId("status").textContent = text || ""; };

  /* addresses */
  function link(view, parts, params) {
    const path = [view, ...(parts || [])].map(encodeURIComponent).join("/");
    const entries = Object.entries(params || {}).filter(([, value]) => value != null && value !== "");
    return `#/${path}${entries.length ? `?${new URLSearchParams(entries)}` : ""}`;
  }
  const go = (view, parts, params) => { location.hash = link(view, parts, params); };
  const replace = (parts, params) => { history.replaceState(null, "", link(current, parts, params)); };
  function place() {
    const [path, query] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
    let parts;
    try {
      parts = path.split("/").filter(Boolean).map(decodeURIComponent);
    } catch {
      parts = [];
    }
    return { view: parts[0], parts: parts.slice(1), params: Object.fromEntries(new URLSearchParams(query || "")) };
  }
  async function draw() {
    const to = place();
    if (location.hash === "#main") return;
    const name = views.has(to.view) ? to.view : home;
    const view = views.get(name), same = name === current;
    if (same && view.update && (await view.update(to.parts, to.params))) return;
    const turn = ++drawn;
    if (current && !same && views.get(current).hide) views.get(current).hide();
    current = name;
    document.title = `${view.title} · Atlas`;
    for (const item of byId("views").querySelectorAll("a")) {
      if (item.dataset.view === name) item.setAttribute("aria-current", "page");
      else item.removeAttribute("aria-current");
    }
    const el = h("section", { class: `view view-${name}`, "aria-label": view.title });
    const main = byId("main");
    status("Loading …");
    delete main.dataset.drawn;
    // what is drawn anew keeps its height meanwhile, so that the page does not jump
    main.style.minHeight = same ? `${main.offsetHeight}px` : "";
    main.replaceChildren(el);
    try {
      await view.show(el, to.parts, to.params, () => turn === drawn);
      if (turn !== drawn) return;
    } catch (error) {
      if (turn !== drawn) return;
      el.replaceChildren(empty("This cannot be shown", error.message));
    }
    main.style.minHeight = "";
    if (!same && document.activeElement === document.body) main.focus({ preventScroll: true });
    status("");
    main.dataset.drawn = String(turn);
  }

  /* keys */
  const KEYS = [["1 – 5, or a view's letter", "go to a view"], ["↑ ↓ ← →", "move in lists, tables and steps"],
    ["/", "search"], ["Enter", "open what has the focus"], ["Escape", "close, or back out"], ["?", "these keys"]];
  function help() {
    const dialog = byId("help");
    dialog.replaceChildren(h("h2", { id: "help-title" }, "Keys"), h("dl", {}, KEYS.concat(
      [...views.values()].map((view) => [view.key, view.title]),
    ).map(([key, text]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, text)])),
    h("form", { method: "dialog" }, h("button", {}, "Close")));
    dialog.showModal();
  }
  function pressed(event) {
    const typing = event.target.closest("input, textarea, select, [contenteditable]");
    if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
    if (typing) {
      if (event.key === "Escape") typing.blur();
      return;
    }
    const view = views.get(current);
    if (view && view.keys && view.keys(event)) { event.preventDefault(); return; }
    const found = [...views.entries()].find(([, each], i) => event.key === String(i + 1) || event.key === each.key);
    if (found) go(found[0]);
    else if (event.key === "?") help();
    else if (event.key === "/" && document.querySelector("[data-search]")) document.querySelector("[data-search]").focus();
    else return;
    event.preventDefault();
  }

  /* start */
  const ORDER = ["models", "episodes", "features", "experiments", "live"];
  let home = about.home;
  function start() {
    byId("run").textContent = about.run;
    const shown = ORDER.filter((name) => views.has(name));
    for (const name of shown) {
      const view = views.get(name);
      views.delete(name);
      views.set(name, view);
      byId("views").append(h("li", {}, h("a", { href: link(name), data: { view: name }, "aria-keyshortcuts": view.key },
        view.title)));
    }
    if (!views.has(home)) home = shown[0];
    byId("keys").addEventListener("click", help);
    document.querySelector(".skip").addEventListener("click", (event) => {
      event.preventDefault();
      byId("main").focus();
    });
    document.addEventListener("keydown", pressed);
    window.addEventListener("hashchange", draw);
    window.addEventListener("beforeunload", () => { const view = views.get(current); if (view && view.hide) view.hide(); });
    // plots take their colours when they are drawn
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      const view = views.get(current);
      if (view && view.hide) view.hide();
      const update = view && view.update;
      if (view) view.update = null;
      draw().finally(() => { if (view) view.update = update; });
    });
    draw();
  }
  window.atlas = {
    live: about.live, simulates: Boolean(about.simulates), run: about.run, get, has, url, post, events, receive,
    view: (name, view) => views.set(name, view), go, replace, link, h, s, table, plot, badge, empty, choose, search,
    number, interval, source, arrows, status, colour, shade, palette: OKABE_ITO,
  };
  document.addEventListener("DOMContentLoaded", start);
})();
