/* Features: a map of all, generality against frequency, search and a table; feature.js shows one of them.

   Address: #/features/<index>?map=umap&color=phase&q=grasp&sort=density&page=2, #/features/<index>/<feature>. */
"use strict";
(() => {
  const { h } = atlas;
  const NUMBERS = { general: "Generality", density: "Density (share of rows)", frames: "Share of plans",
    coverage: "Share of episodes", maximum: "Maximum" };
  const LOG = new Set(["density", "frames", "maximum"]);
  const PAGE = 200;
  let parts = [], state = {}, turn = 0;

  async function show(el, given, params) {
    turn += 1;
    const indexes = await atlas.get("features");
    if (!indexes.length) {
      el.append(h("h1", {}, "Features"), atlas.empty("No feature index here",
        "hooked-vla sae index --store ACTIVATIONS --sae SAE --out RUN/index makes one from what `sae collect` kept."));
      return;
    }
    parts = given;
    state = params;
    const chosen = indexes.find((each) => each.key === given[0]) || indexes.find((each) => !each.error) || indexes[0];
    parts[0] = chosen.key;
    if (given.length > 1) {
      const about = await atlas.get(`features/${chosen.key}`);
      await atlas.showFeature(el, about, given[1], params);
      return;
    }
    await list(el, indexes, chosen);
  }

  async function list(el, indexes, chosen) {
    el.append(h("h1", {}, "Features"));
    if (indexes.length > 1) {
      el.append(h("div", { class: "fields" }, atlas.choose({ label: "Index", value: chosen.key,
        options: indexes.map((each) => [each.key, `${each.site || each.path}${each.error ? " (damaged)" : ""}`]),
        change: (key) => atlas.go("features", [key]) })));
    }
    if (chosen.error) {
      el.append(atlas.empty("This index cannot be shown", chosen.error));
      return;
    }
    const about = await atlas.get(`features/${chosen.key}`);
    const columns = await atlas.get(`features/${chosen.key}/columns`);
    const c = about.counts;
    el.append(h("p", { class: "soft" }, h("code", {}, about.site), ` of ${about.model}: ${c.features} features, `,
      `${c.alive} ever active, ${c.general} general; over ${c.rows} rows of ${c.plans} plans in ${c.episodes} episodes, `,
      `${c.tasks} tasks. `, atlas.source(about.file)));
    const hover = (i) => [h("b", {}, `Feature ${i}`), h("div", {}, columns.descriptions[i]), h("div", { class: "soft" },
      `density ${atlas.number(columns.density[i])}, generality ${atlas.number(columns.general[i])}`)];
    const open = (i) => atlas.go("features", [chosen.key, String(i)]);
    const plots = h("div", { class: "feature-plots" });
    el.append(plots);
    const recolour = [];
    // its colours are those of the map
    const beside = frequency(about, columns, hover, open, recolour);
    plots.append(scatter(about, columns, hover, open, recolour), beside);
    const table = h("section", { "aria-label": "All features" });
    if (about.concepts.length) el.append(concepts(about));
    el.append(table);
    await searchable(table, about, columns);
  }

  /* colours of points by a figure or a label, and what they mean */
  function paint(columns, by) {
    const none = "#8b949e";
    if (columns.labels[by]) {
      const { names, of } = columns.labels[by], used = new Map();
      for (const each of of) if (each >= 0) used.set(each, (used.get(each) || 0) + 1);
      const many = names.length > 7;
      const ranked = [...used.keys()].sort((a, b) => (many ? used.get(b) - used.get(a) : a - b));
      const colours = new Map(ranked.slice(0, 7).map((each, i) => [each, atlas.palette[i]]));
      const rest = of.filter((each) => each >= 0 && !colours.has(each)).length;
      const entries = ranked.slice(0, 7).map((each) => [colours.get(each), names[each], used.get(each)]);
      if (rest) entries.push(["#b08900", "another", rest]);
      entries.push([none, "none stands out", of.filter((each) => each < 0).length]);
      return { colors: of.map((each) => (each < 0 ? none : colours.get(each) || "#b08900")), entries };
    }
    const values = columns[by].map((v) => (v == null || (LOG.has(by) && v <= 0) ? null : LOG.has(by) ? Math.log10(v) : v));
    let low = Infinity, high = -Infinity;
    for (const v of values) if (v != null) { low = Math.min(low, v); high = Math.max(high, v); }
    if (by === "general") [low, high] = [0, 1];
    const shades = Array.from({ length: 65 }, (_, i) => atlas.shade(i / 64, 0, 1).background);
    const at = (v) => shades[Math.round(64 * (high > low ? Math.min(1, Math.max(0, (v - low) / (high - low))) : 0.5))];
    const back = (v) => atlas.number(LOG.has(by) ? 10 ** v : v);
    return { colors: values.map((v) => (v == null ? none : at(v))),
      range: isFinite(low) ? [back(low), back(high)] : null, shades, missing: values.some((v) => v == null) ? none : null };
  }
  function legend(painted, title) {
    const swatch = (color) => h("span", { class: "swatch", style: { background: color }, "aria-hidden": "true" });
    if (painted.entries) {
      return h("ul", { class: "legend", "aria-label": `Colours: ${title}` }, painted.entries.map(([color, name, n]) =>
        h("li", {}, swatch(color), name, " ", h("span", { class: "soft" }, n))));
    }
    return h("div", { class: "legend" }, painted.range ? [painted.range[0], h("span", { class: "ramp", "aria-hidden": "true",
      style: { background: `linear-gradient(to right, ${painted.shades.filter((_, i) => i % 8 === 0).join(", ")})` } }),
    painted.range[1], ` ${title}${LOG.has(state.color || "general") ? ", logarithmic" : ""}`] : title,
    painted.missing ? h("span", { class: "soft" }, swatch(painted.missing), "never active") : null);
  }

  function scatter(about, columns, hover, open, recolour) {
    const ways = about.projections, offered = ["umap", "pca"].filter((each) => each === "pca" || atlas.live
      ? ways[each] === "ready" || ways[each] === "to be made" : atlas.has(`features/${about.key}/map/umap`));
    let way = offered.includes(state.map) ? state.map : offered[0];
    const by = () => (state.color in NUMBERS || state.color in columns.labels ? state.color : "general");
    const note = h("p", { class: "soft" }), legends = h("div", {});
    const n = about.counts.features, nowhere = new Array(n).fill(null);
    const canvas = atlas.dots({ label: "Map of features by their decoder rows; the table below has them all", plain: true,
      x: nowhere, y: nowhere, colors: [], titles: ["", ""], hover, open });
    const said = { pca: "Places: first two principal components of decoder rows of length 1.",
      umap: `Places: UMAP of decoder rows by their cosine (${about.umap.n_neighbors} neighbours, least distance ${about.umap.min_dist}); only who is near whom has a meaning.` };
    async function place() {
      const own = turn;
      if (way === "umap" && ways.umap === "to be made" && atlas.live) {
        const [first] = await Promise.all([atlas.get(`features/${about.key}/map/pca`)]);
        canvas.update(first);
        note.textContent = "UMAP is being made, once, in a minute or two; meanwhile: principal components.";
      }
      try {
        const found = await atlas.get(`features/${about.key}/map/${way}`);
        if (own !== turn) return;
        ways[way] = "ready";
        canvas.update(found);
        note.textContent = said[way] + missing();
      } catch (error) {
        if (own !== turn) return;
        if (way === "pca") throw error;
        way = "pca";
        canvas.update(await atlas.get(`features/${about.key}/map/pca`));
        note.textContent = `${said.pca} ${error.message}`;
      }
    }
    const missing = () => (way === "umap" || ways.umap === "ready" || ways.umap === "to be made" ? ""
      : ways.umap === "too few features" ? ` UMAP is for ${about.min_features} features or more.` : ` No UMAP: ${ways.umap}.`);
    function color() {
      const painted = paint(columns, by());
      canvas.update({ colors: painted.colors }, true);
      legends.replaceChildren(legend(painted, NUMBERS[by()] || by().replace("_", " ")));
      for (const each of recolour) each(painted);
    }
    const keep = (change) => { state = { ...state, ...change }; atlas.replace(parts, state); };
    const controls = h("div", { class: "fields" },
      atlas.choose({ label: "Colour", value: by(), options: [...Object.entries(NUMBERS),
        ...Object.keys(columns.labels).map((kind) => [kind, `Label: ${kind.replace("_", " ")}`])],
      change: (value) => { keep({ color: value }); color(); } }),
      offered.length > 1 ? atlas.choose({ label: "Map", value: way, options: [["umap", "UMAP"], ["pca", "Principal components"]],
        change: (value) => { way = value; keep({ map: value }); place(); } }) : null,
      h("span", { class: "zoom" }, [["−", "Zoom out", 1.4], ["+", "Zoom in", 1 / 1.4]].map(([text, label, by_]) =>
        h("button", { type: "button", "aria-label": label, on: { click: () => canvas.zoom(by_) } }, text)),
      h("button", { type: "button", on: { click: canvas.all } }, "All")));
    color();
    place().catch((error) => { note.textContent = error.message; });
    return h("figure", {}, h("figcaption", {}, h("h2", {}, "Map")), controls, canvas.el, legends, note);
  }

  function frequency(about, columns, hover, open, recolour) {
    const canvas = atlas.dots({ label: "Generality against the share of plans in which a feature is active",
      x: columns.frames, y: columns.general, log: true, colors: [], titles: ["share of plans in which it is active", "generality"],
      yrange: [-0.03, 1.03], threshold: about.threshold, hover, open });
    recolour.push((painted) => canvas.update({ colors: painted.colors }, true));
    const weights = Object.entries(about.generality.weights).map(([name, w]) => `${w} × ${name.replace("_", " ")}`).join(" + ");
    return h("figure", {}, h("figcaption", {}, h("h2", {}, "Generality against frequency")), canvas.el,
      h("p", { class: "soft" }, `Above the line, at ${about.threshold}, a feature counts as general. `,
        "The metric rises with how often a feature is active, whatever it means: read one beside the other. "),
      h("details", {}, h("summary", {}, "How it is computed"), h("p", {}, `σ(${weights} ${about.generality.intercept < 0 ? "−" : "+"} `,
        `${Math.abs(about.generality.intercept)}), fitted on ${about.generality.fitted ?? "labels of its own"}; an activation begins above ${about.generality.on}.`)));
  }

  /* search and table */
  async function searchable(el, about, columns) {
    const head = h("div", { class: "fields" }), body = h("div", {});
    el.append(h("h2", {}, "All features"), head, body);
    const keep = async (change) => {
      state = { ...state, page: "", ...change };
      atlas.replace(parts, state);
      await draw();
    };
    head.append(atlas.search({ label: "Search descriptions, or a feature's number", value: state.q, change: (q) => keep({ q }) }),
      atlas.choose({ label: "Order", value: state.sort || "", options: [["", "best match, or densest"],
        ...about.sorts.map((each) => [each, NUMBERS[each] || each])], change: (sort) => keep({ sort }) }));
    let asked = 0;
    async function draw() {
      const own = ++asked, query = { text: state.q || "", sort: state.sort || "", page: state.page || "1" };
      let found;
      try {
        found = atlas.live ? await atlas.get(`features/${about.key}/find`, query) : filtered(columns, query);
      } catch (error) {
        if (own === asked) body.replaceChildren(atlas.empty("This cannot be shown", error.message));
        return;
      }
      if (own !== asked) return;
      body.replaceChildren(found.n ? rowsOf(about, found) : atlas.empty("Nothing found", "No description has these words."),
        pages(found, (page) => keep({ page: String(page) })),
        atlas.live ? "" : h("p", { class: "soft" }, `A copy: search looks for the words as they are, and pages of ${about.exported} features were kept.`));
    }
    await draw();
  }
  function filtered(columns, { text, sort, page }) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean), n = columns.descriptions.length;
    const by = sort || "density", all = Array.from({ length: n }, (_, i) => i).filter((i) =>
      String(i) === text.trim() || words.every((word) => columns.descriptions[i].toLowerCase().includes(word)));
    if (by !== "feature") {
      const values = columns[by] || columns.density;
      all.sort((a, b) => (values[b] ?? -Infinity) - (values[a] ?? -Infinity) || a - b);
    }
    const start = (Number(page) - 1) * PAGE;
    const rows = all.slice(start, start + PAGE).map((i) => ({ feature: i, description: columns.descriptions[i],
      density: columns.density[i], frames: columns.frames[i], coverage: columns.coverage[i], general: columns.general[i],
      general_null: columns.general_null[i], maximum: columns.maximum[i] }));
    return { rows, n: all.length, page: Number(page), pages: Math.max(1, Math.ceil(all.length / PAGE)) };
  }
  function rowsOf(about, found) {
    const link = (row) => (atlas.has(`features/${about.key}/feature/${row.feature}`)
      ? h("a", { href: atlas.link("features", [about.key, String(row.feature)]) }, row.feature) : String(row.feature));
    const table = atlas.table({ caption: `${found.n} features, page ${found.page} of ${found.pages}`, file: about.file,
      label: "Features", rows: found.rows, columns: [
        { name: "feature", cell: link, number: true }, { name: "description" },
        ...["density", "frames", "coverage", "general"].map((name) => ({ name, number: true,
          title: { frames: "plans", coverage: "episodes", general: "generality" }[name] || name })),
        { name: "general_null", title: "shuffled", number: true }, { name: "maximum", number: true },
      ] });
    table.classList.add("feature-table");
    atlas.arrows(table, "a");
    return table;
  }
  function pages(found, go) {
    if (found.pages < 2) return "";
    const button = (text, page) => h("button", { type: "button", disabled: page < 1 || page > found.pages || page === found.page,
      on: { click: () => go(page) } }, text);
    return h("nav", { class: "fields", "aria-label": "Pages" }, button("First", 1), button("Previous", found.page - 1),
      h("span", {}, `page ${found.page} of ${found.pages}`), button("Next", found.page + 1), button("Last", found.pages));
  }

  function concepts(about) {
    const link = (row) => h("a", { href: atlas.link("features", [about.key, String(row.feature)]) }, `feature ${row.feature}`);
    const table = atlas.table({ caption: "Labels that features tell", rows: about.concepts, label: "Concepts",
      file: about.file.replace("features.parquet", "concepts.parquet"), columns: [
        { name: "label", cell: (row) => [`${row.kind}=${row.value} `, row.is_confounded ? atlas.badge("not judged", "confounded with the task") : ""] },
        { name: "feature", cell: link }, { name: "score", number: true }, { name: "d", title: "Cohen's d", number: true },
        { name: "held_out_score", title: "held-out score", number: true }, { name: "held_out_within", title: "held-out d within tasks", number: true },
        { name: "p_value", title: "p", number: true },
        { name: "is_confirmed", title: "held out", cell: (row) => (row.is_confirmed ? atlas.badge("holds", "confirmed") : atlas.badge("does-not-hold", "not confirmed")) },
      ] });
    return h("details", {  }, h("summary", {}, h("h2", {}, "Concepts")),
      h("p", { class: "soft" }, "Chosen on some episodes by Cohen's d × firing frequency, judged on others."), table);
  }

  atlas.view("features", { title: "Features", key: "f", show, hide() { turn += 1; },
    keys: (event) => (atlas.featureKeys ? atlas.featureKeys(event) : false) });
})();
