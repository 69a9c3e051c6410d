/* Models: what a policy is built of, drawn from its spec; a box or site leads to its shape, meaning and results.
   #/models/<key>/<site, block or pathway> */
"use strict";
(() => {
  const { h, s, link, badge } = atlas;
  const WIDTH = 168, GAP = 56, TOP = 64, BOX = { few: 26, many: 15 }, SPACE = 4;
  const SOURCES = { run: "in this run", package: "in the package", published: "published" };

  const inside = (name, box) => name === box || name.startsWith(`${box}.`);
  const short = (box) => box.part || box.name.slice(box.pathway.length + 1).replaceAll("blocks.", "block ");

  /* Results that name a place: by itself, through its block, or through its pathway. */
  function resultsAt(results, name, box) {
    const found = { here: [], block: [], pathway: [] };
    for (const each of results) {
      if (each.places.includes(name)) found.here.push(each);
      else if (box && each.places.some((place) => inside(place, box.name))) found.block.push(each);
      else if (each.places.includes(name.split(".")[0])) found.pathway.push(each);
    }
    return found;
  }

  function drawing(model, results, chosen) {
    const columns = model.pathways.map((pathway) => ({ ...pathway,
      boxes: model.boxes.filter((box) => box.pathway === pathway.name) })).filter((column) => column.boxes.length);
    const tallest = Math.max(...columns.map((column) => column.boxes.length));
    const height = tallest > 20 ? BOX.many : BOX.few, step = height + SPACE;
    const bottom = TOP + tallest * step, width = columns.length * (WIDTH + GAP) + 2 * GAP;
    const at = new Map();
    columns.forEach((column, i) => column.boxes.forEach((box, j) => {
      at.set(box.name, { x: GAP + i * (WIDTH + GAP), y: bottom - (j + 1) * step });
    }));
    const lines = [], end = (box) => at.get(box.name);
    columns.forEach((column, i) => {
      const before = columns[i - 1];
      if (!before) return;
      const readers = column.boxes.filter((box) => box.reads);
      // a block that reads keys and values of the block beside it
      for (const box of readers) {
        const from = at.get(box.name.replace(column.name, before.name));
        if (from) lines.push(s("path", { class: "reads",
          d: `M${from.x + WIDTH} ${from.y + height / 2}L${end(box).x - 2} ${end(box).y + height / 2}` }));
      }
      if (readers.length) return;
      const from = end(before.boxes[before.boxes.length - 1]), to = end(column.boxes[0]);
      const [x1, y1, x2, y2] = [from.x + WIDTH, from.y + height / 2, to.x, to.y + height / 2];
      lines.push(s("path", { class: "flow", "marker-end": "url(#tip)",
        d: `M${x1} ${y1}C${x1 + GAP / 2} ${y1} ${x2 - GAP / 2} ${y2} ${x2 - 3} ${y2}` }));
    });
    const picked = chosen && model.boxes.find((box) => box.sites.some((site) => site.name === chosen) || box.name === chosen);
    const boxes = model.boxes.filter((box) => at.has(box.name)).map((box) => {
      const { x, y } = at.get(box.name);
      const named = results.some((each) => each.places.some((place) => inside(place, box.name)));
      const said = [box.name, `${box.sites.length} hook points`,
        box.dead === "all" ? "dead end" : box.dead === "some" ? "partly a dead end" : null, named ? "has results" : null];
      return s("a", { href: link("models", [model.key, box.name]), "aria-label": said.filter(Boolean).join(", "),
        class: `box dead-${box.dead}${box === picked ? " chosen" : ""}`, "aria-current": box === picked ? "true" : null },
      s("rect", { x, y, width: WIDTH, height, rx: 3 }),
      s("text", { x: x + 8, y: y + height / 2 + 4, class: height === BOX.few ? null : "tight" }, short(box)),
      named ? s("circle", { cx: x + WIDTH - 10, cy: y + height / 2, r: 3.5 }) : null);
    });
    const titles = columns.map((column, i) => {
      const x = GAP + i * (WIDTH + GAP), y = bottom - column.boxes.length * step - 30;
      return s("a", { href: link("models", [model.key, column.name]), class: "pathway",
        "aria-label": `pathway ${column.name}` }, s("text", { x, y }, column.name), s("text", { x, y: y + 16, class: "small" },
        `${column.d_model === "–" ? "" : `d ${column.d_model}, `}${millions(column.parameters)} parameters`));
    });
    const last = columns[columns.length - 1].boxes, out = end(last[last.length - 1]), first = end(columns[0].boxes[0]);
    lines.push(s("path", { class: "flow", "marker-end": "url(#tip)",
      d: `M${out.x + WIDTH} ${out.y + height / 2}h${GAP / 2}` }),
    s("path", { class: "flow", "marker-end": "url(#tip)", d: `M${first.x - GAP / 2} ${first.y + height / 2}h${GAP / 2 - 3}` }));
    const svg = s("svg", { width, height: bottom + 12, viewBox: `0 0 ${width} ${bottom + 12}`, role: "group",
      "aria-label": `Architecture of ${model.name}` },
    s("defs", {}, s("marker", { id: "tip", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7,
      orient: "auto" }, s("path", { d: "M0 0L8 4L0 8z", class: "tip" }))), lines, boxes, titles,
    s("text", { x: out.x + WIDTH + GAP / 2 + 4, y: out.y + height / 2 + 4, class: "small" }, "actions"));
    return h("div", { class: "scroll drawing", tabindex: "0", role: "region", "aria-label": "Architecture" }, svg);
  }
  const millions = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)} B` : n >= 1e6 ? `${(n / 1e6).toFixed(1)} M`
    : n >= 1e3 ? `${(n / 1e3).toFixed(0)} k` : `${n}`);
  const shape = (site) => `[${site.shape.join(", ")}]`;

  /* what is chosen */
  function siteTable(model, sites, caption) {
    return atlas.table({ caption, rows: sites, columns: [
      { name: "name", title: "hook point", cell: (site) => h("a", { href: link("models", [model.key, site.name]) },
        h("code", {}, site.name)) },
      { name: "shape", cell: (site) => h("code", {}, shape(site)) },
      { name: "reaches", title: "reaches the action", cell: (site) => (site.reaches ? "yes" : badge("dead end")) },
      { name: "meaning" }] });
  }
  function resultTable(found, caption) {
    const shown = (each) => (each.measured.length ? each.measured.map(([name, value, low, high], i) => [i ? "; " : "",
      `${name.replaceAll("_", " ")} `, h("b", {}, atlas.number(value)), low == null ? "" : ` (${atlas.interval(low, high)})`])
      : `${each.rows} rows`);
    return atlas.table({ caption, rows: found, columns: [
      { name: "experiment", cell: (each) => h("a", { href: link("experiments", [each.key]) }, each.experiment) },
      { name: "value", title: "what was done", cell: (each) => h("a", { href: link("experiments", [each.key, each.table],
        { as: "rows", where: JSON.stringify({ [each.column]: each.value }) }) }, each.value) },
      { name: "table", cell: (each) => `${each.table}, ${each.column}` },
      { name: "measured", cell: shown }] });
  }
  function details(model, results, chosen) {
    const pathway = model.pathways.find((each) => each.name === chosen);
    const box = model.boxes.find((each) => each.name === chosen || each.sites.some((site) => site.name === chosen));
    const site = box && box.sites.find((each) => each.name === chosen);
    if (!pathway && !box) return [atlas.empty("No such place", `${model.name} has no hook point or block ${chosen}.`)];
    const out = [];
    if (site) {
      out.push(h("h2", {}, h("code", {}, site.name)), h("p", {}, site.meaning),
        h("dl", { class: "settings" },
          [["shape", `${shape(site)}: ${site.axes.join(", ")}`], ["type", site.dtype],
            ["in a chunk", site.repeated ? `${model.denoise_steps} times, once a step` : "once"],
            ["reaches the action", site.reaches ? "yes" : [badge("dead end"), " no action depends on it"]],
            ["block", h("a", { href: link("models", [model.key, box.name]) }, box.name)]].map(([name, value]) =>
            [h("dt", {}, name), h("dd", {}, value)])));
    } else if (pathway) {
      out.push(h("h2", {}, pathway.name), h("p", {}, `${pathway.meaning}. ${millions(pathway.parameters)} parameters, ` +
        `${pathway.points} hook points.`));
      const boxes = model.boxes.filter((each) => each.pathway === pathway.name && each.part);
      out.push(siteTable(model, boxes.flatMap((each) => each.sites), `Hook points of ${pathway.name} outside of its blocks`));
    } else {
      out.push(h("h2", {}, box.name), box.dead === "all" ? h("p", {}, badge("dead end"), " no action depends on it") : "",
        siteTable(model, box.sites, `Hook points of ${box.name}`));
    }
    const found = resultsAt(results, chosen, box);
    if (found.here.length) out.push(resultTable(found.here, `Results that name ${chosen}`));
    if (found.block.length) out.push(resultTable(found.block, site ? `Results in ${box.name}` : `Results within ${chosen}`));
    if (found.pathway.length) out.push(resultTable(found.pathway, `Results of all of ${chosen.split(".")[0]}`));
    if (!found.here.length && !found.block.length && !found.pathway.length) {
      out.push(h("p", { class: "soft" }, model.source === "run" ? "No table of this run names this place."
        : "This run has no results with this model."));
    }
    return out;
  }

  function chooser(all, key) {
    const shown = all.filter((each) => atlas.has(`models/${each.key}`));
    return h("div", { class: "fields" }, atlas.choose({ label: "Model", value: key,
      options: shown.map((each) => [each.key, `${each.name} (${SOURCES[each.source]})`]),
      change: (value) => atlas.go("models", [value]) }));
  }
  async function show(el, parts) {
    const all = await atlas.get("models");
    const key = parts[0] || (all[0] && all[0].key);
    el.append(h("h1", {}, "Models"), chooser(all, key));
    const model = await atlas.get(`models/${key}`);
    const path = `models/${key}/results`;
    const results = model.source === "run" && atlas.has(path) ? await atlas.get(path) : [];
    el.append(h("p", {}, h("b", {}, model.name), `, of the family ${model.family} (as published: ${model.description}). `,
      `${millions(model.parameters)} parameters; cameras ${model.cameras.join(", ") || "none"}; state ${model.d_state}, `,
      `action ${model.d_action}; ${model.denoise_steps} step${model.denoise_steps === 1 ? "" : "s"} a chunk.`));
    el.append(drawing(model, results, parts[1]));
    el.append(h("p", { class: "soft legend" }, "Every box is a block, the first one lowest. Arrows: the order of computation; ",
      "dashed lines: keys and values that a block reads. A broken edge: no action depends on it, or on part of it. A dot: results name it."));
    el.append(...(parts[1] ? details(model, results, parts[1]) : [pathwayTable(model), places(model)]));
    atlas.arrows(el, "svg a.box");
    const picked = el.querySelector("a.chosen rect");
    // within its own frame: the page stays where it is
    if (picked) el.querySelector(".drawing").scrollLeft = picked.getAttribute("x") - GAP;
  }
  const places = (model) => h("p", { class: "soft" }, model.dead_ends.length
    ? `Dead ends: ${model.dead_ends.join(", ")}.` : "No dead ends: an action depends on every hook point.");
  const pathwayTable = (model) => atlas.table({ caption: "Pathways", rows: model.pathways, columns: [
    { name: "name", cell: (row) => h("a", { href: link("models", [model.key, row.name]) }, row.name) },
    { name: "meaning" }, { name: "parameters", number: true, cell: (row) => row.parameters.toLocaleString("en") },
    { name: "blocks", number: true }, { name: "d_model", number: true }, { name: "points", title: "hook points", number: true }] });
  atlas.view("models", { title: "Models", key: "m", show });
})();
