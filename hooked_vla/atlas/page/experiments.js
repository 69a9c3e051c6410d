/* Experiments: rules with their verdicts, tables as heat maps, and the rows that a number comes from.
   #/experiments, #/experiments/<key>/<table>?as=measures|grid|models|rows&measure=&rows=&columns=&where={}&page= */
"use strict";
(() => {
  const { h, link, badge } = atlas;
  const words = (text) => String(text).replaceAll("_", " ");

  /* all experiments, by model */
  function verdictBadges(entry) {
    const counts = new Map();
    for (const rule of entry.rules) counts.set(rule.verdict, (counts.get(rule.verdict) || 0) + 1);
    return [...counts].map(([verdict, n]) => [badge(verdict, `${n} ${verdict}`), " "]);
  }
  const warnings = (entry) => [
    entry.quick ? [badge("quick"), " "] : null,
    entry.labels.some((label) => label.startsWith("replay")) ? [badge("replay"), " "] : null,
    entry.labels.some((label) => label.startsWith("dead end")) ? [badge("dead end"), " "] : null,
    entry.error ? [badge("damaged"), " "] : null,
  ];
  function overview(el, all) {
    el.append(h("h1", {}, "Experiments"));
    if (!all.length) {
      el.append(atlas.empty("No experiments in this run",
        "`hooked-vla experiment run E4 --quick --out RUN` makes one; open its folder, or one that holds several."));
      return;
    }
    const order = (id) => Number((/\d+/.exec(id) || ["1e9"])[0]);
    const ids = [...new Set(all.map((entry) => entry.experiment))].sort((a, b) => order(a) - order(b) || (a < b ? -1 : 1));
    const models = [...new Set(all.map((entry) => entry.model))].sort();
    const title = (id) => (all.find((entry) => entry.experiment === id && entry.title) || {}).title || "";
    el.append(h("p", { class: "soft" }, "What was measured, by experiment and model. Blank: not run."));
    const body = ids.map((id) => h("tr", {}, h("th", { scope: "row" }, id), h("td", {}, title(id)), models.map((model) =>
      h("td", {}, all.filter((entry) => entry.experiment === id && entry.model === model).map((entry) => h("div", {},
        h("a", { href: link("experiments", [entry.key]), "aria-label": `${id} with ${model || "an unknown model"}` },
          entry.finished ? "results" : "unfinished"), " ", verdictBadges(entry), warnings(entry),
        all.filter((o) => o.experiment === id && o.model === model).length > 1
          ? h("small", { class: "soft" }, entry.path) : null))))));
    const table = h("table", {}, h("caption", {}, "Experiments by model"), h("thead", {}, h("tr", {},
      ["experiment", "title", ...models.map((model) => model || "(no model named)")].map((name) =>
        h("th", { scope: "col" }, name)))), h("tbody", {}, body));
    el.append(h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Experiments by model" }, table));
    atlas.arrows(el, "tbody a");
  }

  /* one experiment */
  function heading(el, all, one) {
    el.append(h("p", {}, h("a", { href: link("experiments") }, "All experiments")));
    el.append(h("h1", {}, `${one.experiment}${one.title ? `: ${one.title}` : ""}`));
    el.append(h("p", {}, h("span", { class: "soft" }, "model "), one.model
      ? h("a", { href: link("models", [one.model]) }, one.model) : "unknown", " ", warnings(one), atlas.source(one.path)));
    if (one.error) el.append(h("p", { class: "callout" }, one.error));
    if (one.question) el.append(h("p", {}, one.question));
    for (const label of one.labels) {
      const kind = /^(replay|dead end)/.exec(label);
      el.append(h("p", { class: "callout" }, kind ? [badge(kind[1]), " "] : null, label));
    }
    if (one.published) el.append(h("details", {}, h("summary", {}, "What was published"), h("p", {}, one.published)));
    if (one.rules.length) {
      const shown = atlas.table({ caption: "Rules, and what was seen", file: `${one.path}/verdicts.json`, rows: one.rules,
        columns: [{ name: "rule", cell: (rule) => rule.text }, { name: "measured", cell: (rule) => rule.measured },
          { name: "verdict", cell: (rule) => badge(rule.verdict) }] });
      shown.classList.add("verdicts");
      el.append(shown);
    }
  }
  function figures(el, one) {
    if (!one.figures.length) return;
    el.append(h("h2", {}, "Figures of the report"), h("div", { class: "figures" }, one.figures.map((each) => h("figure", {},
      h("img", { src: atlas.url(`experiments/${one.key}/figure/${each.name}`, "png"), loading: "lazy",
        alt: each.caption || words(each.name) }),
      h("figcaption", {}, each.caption || words(each.name), " ", atlas.source(each.file))))));
  }
  function remarks(el, one) {
    const limits = one.limits.split(/^- /m).map((text) => text.trim()).filter(Boolean);
    if (limits.length) el.append(h("h2", {}, "Limits"), h("ul", {}, limits.map((text) => h("li", {}, text))));
    const said = (value) => (Array.isArray(value) ? value.join(", ") : value && typeof value === "object"
      ? JSON.stringify(value) : String(value));
    const entries = [...Object.entries(one.settings), ["first seed", one.seed],
      ...Object.entries(one.versions).filter(([, version]) => version != null)];
    el.append(h("details", {}, h("summary", {}, "What was run"), h("dl", { class: "settings" },
      entries.map(([name, value]) => [h("dt", {}, words(name)), h("dd", {}, said(value))]))));
  }

  /* its tables */
  async function tableSection(el, one, name, params) {
    const entry = one.tables.find((each) => each.name === name) || one.tables[0];
    if (!entry) {
      el.append(atlas.empty("No tables yet", "The run has not finished: run the same command again to go on."));
      return;
    }
    el.append(h("h2", { id: "tables" }, "Tables"), h("ul", { class: "tabs" }, one.tables.map((each) => h("li", {},
      h("a", { href: link("experiments", [one.key, each.name]), "aria-current": each === entry ? "true" : null },
        words(each.name), " ", h("small", {}, each.error ? "damaged" : each.total))))));
    if (entry.error) {
      el.append(atlas.empty("This table cannot be read", entry.error));
      return;
    }
    const about = await atlas.get(`experiments/${one.key}/table/${entry.name}`);
    if (about.error) {
      el.append(atlas.empty("This table cannot be read", about.error));
      return;
    }
    const numbers = about.columns.filter((column) => column.role === "measure");
    const ways = { measures: numbers.length && about.total <= 200, grid: about.grid && numbers.length,
      models: numbers.length && one.alike.length > 1, rows: true };
    const usual = entry.name !== "results" && about.grid && about.grid.quality >= 0.45 ? "grid"
      : ways.measures ? "measures" : ways.grid ? "grid" : "rows";
    const way = ways[params.as] ? params.as : usual;
    const to = (change) => atlas.go("experiments", [one.key, entry.name], { ...params, ...change });
    const titles = { measures: "all measures", grid: "one measure over two keys", models: "models side by side",
      rows: "rows" };
    const fields = h("div", { class: "fields" }, atlas.choose({ label: "Show", value: way,
      options: Object.keys(ways).filter((key) => ways[key]).map((key) => [key, titles[key]]),
      change: (value) => to({ as: value, where: "", page: "" }) }));
    const out = h("div", {});
    el.append(fields, out);
    await { measures: asMeasures, grid: asGrid, models: asModels, rows: asRows }[way](
      { out, fields, one, entry, about, params, to, numbers });
  }
  const rowsLink = (one, table, where) => link("experiments", [one.key, table], { as: "rows", where: JSON.stringify(where) });

  async function asMeasures({ out, one, entry, about }) {
    const page = await atlas.get(`experiments/${one.key}/table/${entry.name}/page/0`);
    out.append(atlasHeat.measures({ about, page, caption: `${one.experiment}, ${words(entry.name)}`,
      rowHref: (where) => rowsLink(one, entry.name, where) }));
    out.append(h("p", { class: "soft" }, "Below a value: its interval, its floor or chance, and its control. Colours go ",
      "from 0 to 1 for shares, to the largest value otherwise, and from blue to red about 0 for what has a sign."));
  }

  async function asGrid({ out, fields, one, entry, about, params, to, numbers }) {
    const names = about.columns.map((column) => column.name);
    const keys = about.columns.filter((c) => c.role === "key" && c.distinct > 1 && c.distinct <= 300).map((c) => c.name);
    const measure = numbers.find((c) => c.name === params.measure) || numbers[0];
    const usual = [names[about.grid.rows], names[about.grid.columns]];
    let [rows, columns] = keys.includes(params.rows) && keys.includes(params.columns) && params.rows !== params.columns
      ? [params.rows, params.columns] : usual;
    const path = (a, b) => `experiments/${one.key}/grid/${entry.name}/` +
      [measure.name, a, b].map((name) => names.indexOf(name)).join("/");
    fields.append(atlas.choose({ label: "Measure", value: measure.name, options: numbers.map((c) => [c.name, words(c.name)]),
      change: (value) => to({ as: "grid", measure: value }) }));
    const pairs = keys.flatMap((a) => keys.filter((b) => b !== a).map((b) => [a, b])).filter(([a, b]) => atlas.has(path(a, b)));
    if (!atlas.has(path(rows, columns))) [rows, columns] = usual;
    if (pairs.length > 1) {
      fields.append(atlas.choose({ label: "Rows and columns", value: `${rows}\n${columns}`,
        options: pairs.map(([a, b]) => [`${a}\n${b}`, `${words(a)} by ${words(b)}`]),
        change: (value) => { const [a, b] = value.split("\n"); to({ as: "grid", rows: a, columns: b }); } }));
    }
    const found = await atlas.get(path(rows, columns));
    out.append(atlasHeat.grid({ found, column: measure, caption: `${words(measure.name)}: ${words(rows)} by ${words(columns)}`,
      href: (a, b) => rowsLink(one, entry.name, { [rows]: a, [columns]: b }) }));
  }

  async function asModels({ out, fields, one, entry, about, params, to, numbers }) {
    const measure = numbers.find((c) => c.name === params.measure) || numbers[0];
    fields.append(atlas.choose({ label: "Measure", value: measure.name, options: numbers.map((c) => [c.name, words(c.name)]),
      change: (value) => to({ as: "models", measure: value }) }));
    // sites and layers differ between models, arms by their name do not
    const keys = about.columns.filter((c) => c.role === "key" && c.distinct >= 1 && c.name !== "seed").map((c) => c.name);
    const ends = ["low", "high"].map((role) => (about.columns.find((c) => c.of === measure.name && c.role === role) || {}).name);
    const sides = await Promise.all(one.alike.map(async (other) => {
      const path = `experiments/${other.key}/table/${entry.name}/page/0`;
      const page = atlas.has(path) ? await atlas.get(path).catch(() => null) : null;
      return { ...other, page };
    }));
    const rows = new Map();
    for (const side of sides.filter((each) => each.page)) {
      const at = (row, name) => { const i = side.page.columns.indexOf(name); return i < 0 ? null : row[i]; };
      for (const row of side.page.rows) {
        const where = Object.fromEntries(keys.map((name) => [name, at(row, name)]));
        const label = keys.map((name) => where[name]).filter((value) => value != null && value !== "").join(" · ");
        if (!rows.has(label)) rows.set(label, new Map());
        rows.get(label).set(side.key, { where, value: at(row, measure.name), low: at(row, ends[0]), high: at(row, ends[1]) });
      }
    }
    const scale = atlasHeat.scaleOf(measure);
    const head = h("tr", {}, h("th", { scope: "col" }, keys.map(words).join(" · ")), sides.map((side) =>
      h("th", { scope: "col" }, h("a", { href: link("experiments", [side.key]) }, side.model || side.key))));
    const body = [...rows].map(([label, found]) => h("tr", { class: atlasHeat.kindOf(label) ? "reference" : null },
      h("th", { scope: "row", class: "name" }, label), sides.map((side) => {
        const each = found.get(side.key) || {};
        return atlasHeat.cell({ ...each, scale, name: `${words(measure.name)} of ${label}, ${side.model}`,
          href: rowsLink(side, entry.name, each.where || {}) });
      })));
    out.append(atlasHeat.framed(`${words(measure.name)} of ${one.experiment}, model by model`,
      sides.filter((side) => side.page).map((side) => side.page.file).join(", "), head, body, "heat-table"));
    if (about.total > 200) out.append(h("p", { class: "soft" }, "The first 200 rows of every table."));
  }

  async function asRows({ out, one, entry, about, params, to }) {
    let where = {};
    try {
      where = JSON.parse(params.where || "{}") || {};
    } catch { /* a damaged address shows all rows */ }
    const page = await rowsOf(one, entry, where, Math.max(0, Number(params.page) || 0));
    const chosen = Object.entries(where);
    if (chosen.length) {
      out.append(h("p", {}, "Rows with ", chosen.map(([name, value], i) => [i ? ", " : "", h("b", {}, words(name)), " = ",
        value === null || value === "" ? "(none)" : String(value)]), ". ",
      h("a", { href: link("experiments", [one.key, entry.name], { as: "rows" }) }, "All rows")));
    }
    const last = Math.max(0, Math.ceil(page.total / page.size) - 1);
    const caption = `${words(entry.name)}: ${page.total} row${page.total === 1 ? "" : "s"}` +
      (last ? `, page ${page.page + 1} of ${last + 1}` : "");
    const shown = ["row", ...page.columns].map((name, i) => ({ name, title: words(name),
      number: i === 0 || ["number", "integer"].includes(about.columns[i - 1].type), cell: (row) => row[i] }));
    // what was recorded of a row, before what was measured on it
    if (page.episodes.some(Boolean)) {
      shown.splice(1, 0, { name: "recorded", cell: (row) => episodesLink(row[page.columns.length + 1]) });
    }
    out.append(atlas.table({ caption, file: page.file, columns: shown,
      rows: page.rows.map((row, i) => [page.numbers[i], ...row, page.episodes[i]]) }));
    if (last) {
      const step = (by, text) => h("button", { type: "button", disabled: page.page + by < 0 || page.page + by > last,
        on: { click: () => to({ as: "rows", page: String(page.page + by) }) } }, text);
      out.append(h("div", { class: "fields" }, step(-1, "Previous page"), step(1, "Next page")));
    }
  }
  const episodesLink = (held) => (!held ? "" : held.episode != null
    ? h("a", { href: link("episodes", [held.rollout, held.episode]), title: held.path, class: "recorded" }, `episode ${held.episode}`)
    : h("a", { href: link("episodes", [held.rollout], { arm: held.arm, task: held.task }), title: held.path, class: "recorded" },
      `${held.n} episode${held.n === 1 ? "" : "s"}`));
  /* A copy without a server filters the pages that it holds. */
  async function rowsOf(one, entry, where, page) {
    const names = Object.keys(where);
    const path = (at) => `experiments/${one.key}/table/${entry.name}/page/${at}`;
    if (!names.length) return atlas.get(path(page));
    if (atlas.live) return atlas.get(`experiments/${one.key}/rows/${entry.name}`, { where: JSON.stringify(where), page });
    const kept = { rows: [], numbers: [], episodes: [], page: 0, size: Infinity, total: 0 };
    for (let at = 0; at * 200 < entry.total; at += 1) {
      const found = await atlas.get(path(at));
      Object.assign(kept, { columns: found.columns, file: found.file });
      const at_ = names.map((name) => [found.columns.indexOf(name), where[name]]);
      found.rows.forEach((row, i) => {
        if (at_.every(([column, value]) => (row[column] ?? null) === value)) {
          kept.rows.push(row);
          kept.numbers.push(found.numbers[i]);
          kept.episodes.push(found.episodes[i]);
        }
      });
    }
    return { ...kept, total: kept.rows.length };
  }

  async function show(el, parts, params) {
    const all = await atlas.get("experiments");
    if (!parts.length) return overview(el, all);
    const one = await atlas.get(`experiments/${parts[0]}`);
    heading(el, all, one);
    const tables = h("section", { "aria-label": "Tables" });
    el.append(tables);
    figures(el, one);
    remarks(el, one);
    await tableSection(tables, one, parts[1], params);
    if (parts[1] && params.where) tables.scrollIntoView();
  }
  atlas.view("experiments", { title: "Experiments", key: "x", show });
})();
