/* One feature: what it is about, figures, what is like it, where it is active token by token, and what steering did.

   Address: #/features/<index>/<feature>?plans=across&step=3; ← → go to the feature before and after. */
"use strict";
(() => {
  const { h } = atlas;
  const FIGURES = [["density", "rows in which it is active"], ["frames", "plans in which it is active"],
    ["coverage", "episodes in which it is active"], ["maximum", "maximum"], ["mean", "mean where active"],
    ["onsets", "mean onsets in an episode"], ["magnitude", "mean of episodes' maxima"], ["run_length", "relative length of runs"],
    ["general", "generality"], ["general_null", "generality with shuffled episodes"], ["general_p", "p against shuffled episodes"]];
  const KIND = { decoder: "Alike by decoder direction", coactive: "Active in the same tokens" };
  const MEASURE = { decoder: "cosine", coactive: "Jaccard" };
  let here = null, turn = 0;

  async function showFeature(el, about, number, params) {
    const own = ++turn;
    const one = await atlas.get(`features/${about.key}/feature/${number}`);
    here = { about, number: one.feature, n: one.n_features };
    const parts = [about.key, String(one.feature)], state = { ...params };
    const keep = (change) => { Object.assign(state, change); atlas.replace(parts, state); };
    document.title = `Feature ${one.feature} · Features · Atlas`;
    el.append(header(about, one), h("p", { class: "feature-says" }, one.description));
    if (!one.density) {
      el.append(atlas.empty("Never active", "No row of the index's activations made this feature active."), near(about, one));
      return;
    }
    el.append(h("div", { class: "feature-parts" }, histogram(one), figures(about, one), shares(one)), h("div", {}, told(about, one)));
    el.append(plans(about, one, state, keep, () => own === turn));
    el.append(h("section", {}, h("h2", {}, "Similar features"), h("div", { class: "feature-parts" }, near(about, one))));
    const courses = h("section", {}), steered = h("section", {});
    el.append(courses, steered);
    course(courses, about, one);
    await steering(steered, about, one);
  }

  function header(about, one) {
    const step = (by, text, label) => {
      const to = one.feature + by, there = to >= 0 && to < one.n_features && atlas.has(`features/${about.key}/feature/${to}`);
      return there ? h("a", { href: atlas.link("features", [about.key, String(to)]), "aria-label": label }, text)
        : h("span", { class: "soft", "aria-hidden": "true" }, text);
    };
    const confirmed = one.concepts.filter((each) => each.is_confirmed);
    return h("div", {}, h("nav", { "aria-label": "Way back", class: "soft" }, h("a", { href: atlas.link("features", [about.key]) }, "Features"),
      " of ", h("code", {}, one.site), ` of ${about.model}`),
    h("div", { class: "feature-head" }, h("h1", {}, `Feature ${one.feature}`), step(-1, "←", "The feature before"), step(1, "→", "The feature after"),
      one.general == null ? null : atlas.badge(one.general >= about.threshold ? "general" : "memorised"),
      confirmed.map((each) => atlas.badge("holds", `tells ${each.kind}=${each.value}`)),
      one.concepts.some((each) => each.is_confounded) ? atlas.badge("not judged", "confounded with the task") : null));
  }

  function figures(about, one) {
    const rows = FIGURES.map(([name, title]) => ({ title, value: one[name], rank: { density: one.rank.density, general: one.rank.general }[name] }));
    return atlas.table({ caption: "Figures", file: about.file, label: "Figures", rows, columns: [
      { name: "title", title: "figure" }, { name: "value", number: true },
      { name: "rank", title: "rank", number: true, cell: (row) => (row.rank == null ? "" : `${row.rank + 1} of ${about.counts.alive}`) },
    ] });
  }

  function histogram(one) {
    const { counts, maximum } = one.histogram, width = maximum / counts.length, el = h("div", {});
    const figure = h("figure", {}, h("figcaption", {}, h("h2", {}, "How strongly it is active")), el,
      h("p", { class: "soft" }, `${counts.reduce((a, b) => a + b, 0)} active rows of a share of ${atlas.number(one.density)}; counts are logarithmic.`));
    requestAnimationFrame(() => {
      if (!el.isConnected) return;
      atlas.plot(el, [{ type: "bar", x: counts.map((_, i) => (i + 0.5) * width), y: counts.map((c) => c || null), marker: { color: atlas.palette[0] },
        hovertemplate: "around %{x:.3g}: %{y} rows<extra></extra>" }], { height: 260, bargap: 0.05,
        xaxis: { title: { text: "activation" }, range: [0, maximum] }, yaxis: { title: { text: "rows" }, type: "log", dtick: 1, range: [-0.3, Math.log10(1.3 * Math.max(1, ...counts))] } },
      { label: `Histogram of feature ${one.feature}: ${counts.join(", ")} rows in equal bins from 0 to ${atlas.number(maximum)}` });
    });
    return figure;
  }

  // what a label adds to the divergence of its activation from all rows
  const gain = (row) => row.share * Math.log(row.lift);
  function shares(one) {
    const best = one.shares.filter((row) => row.lift > 1.05).sort((a, b) => gain(b) - gain(a)).slice(0, 10);
    const bar = (row) => h("span", { class: "share" }, h("i", { style: { width: `${100 * row.share}%` } }), `${Math.round(100 * row.share)} %`);
    const table = (rows, caption) => atlas.table({ caption, label: caption, file: `${one.files}/shares.parquet`, rows, columns: [
      { name: "label", cell: (row) => `${row.kind.replace("_", " ")} ${row.value}` }, { name: "share", title: "of its activation", cell: bar },
      { name: "lift", title: "lift", number: true, cell: (row) => `×${atlas.number(row.lift)}` },
    ] });
    const all = h("details", {}, h("summary", {}, `All ${one.shares.length} labels`));
    all.addEventListener("toggle", () => { if (all.open && all.children.length === 1) all.append(table(one.shares, "Every label")); });
    return h("div", {}, table(best, "Labels that it stands out by"), one.shares.length > best.length ? all : null,
      h("p", { class: "soft" }, "Lift: the share of its activation over the label's share of all rows; ×1 is chance."));
  }

  function near(about, one) {
    const link = (row) => (atlas.has(`features/${about.key}/feature/${row.neighbour}`)
      ? h("a", { href: atlas.link("features", [about.key, String(row.neighbour)]) }, row.neighbour) : String(row.neighbour));
    return Object.entries(one.neighbours).map(([kind, rows]) => {
      const table = atlas.table({ caption: KIND[kind], label: KIND[kind], file: `${one.files}/neighbours.parquet`, rows, columns: [
        { name: "neighbour", title: "feature", cell: link, number: true }, { name: "value", title: MEASURE[kind], number: true }, { name: "description" }] });
      table.classList.add("feature-near");
      atlas.arrows(table, "a");
      return table;
    });
  }

  function told(about, one) {
    if (!one.concepts.length) return null;
    return atlas.table({ caption: "Labels that it was chosen for", label: "Concepts", file: `${one.files}/concepts.parquet`, rows: one.concepts, columns: [
      { name: "label", cell: (row) => `${row.kind}=${row.value}` }, { name: "d", title: "Cohen's d", number: true }, { name: "held_out_d", title: "held out", number: true },
      { name: "held_out_within", title: "within tasks", number: true }, { name: "p_value", title: "p", number: true },
      { name: "is_confirmed", title: "", cell: (row) => (row.is_confirmed ? atlas.badge("holds", "confirmed") : atlas.badge("does-not-hold", "not confirmed")) },
    ] });
  }

  /* plans: heat maps on camera images, other segments as strips */
  function plans(about, one, state, keep, current) {
    const body = h("div", { class: "plans" }), head = h("div", { class: "fields" }), note = h("p", { class: "soft" });
    const steps = about.denoise_steps, own = { number: 0 };
    const draw = () => {
      const which = state.plans === "across" ? "across" : "top", listed = one.plans[which];
      body.replaceChildren(...listed.map((plan) => card(about, one, plan, state.step ?? "")));
      note.textContent = which === "top" ? "The plans in which it is largest, one an episode; colours from 0 to its maximum anywhere."
        : "From all plans in which it is active, ordered by its maximum: at a quarter, the middle and three quarters. The largest alone flatter a feature.";
      const drawn = ++own.number;
      if (about.pooling === "token") pictures(about, body, note, () => current() && own.number === drawn);
    };
    head.append(atlas.choose({ label: "Plans", value: state.plans || "top", options: [["top", "the largest"], ["across", "across its range"]],
      change: (value) => { keep({ plans: value }); draw(); } }));
    if (steps.length > 1) {
      head.append(atlas.choose({ label: "Denoise step", value: state.step ?? "", options: [["", "largest of all"], ...steps.map((each) => [String(each), String(each)])],
        change: (value) => { keep({ step: value }); draw(); } }));
    }
    requestAnimationFrame(draw);
    return h("section", { "aria-label": "Plans" }, h("h2", {}, "Where it is active"), head, note, body);
  }
  function card(about, one, plan, step, title) {
    const labels = ["task", "phase", "direction", "outcome"].filter((name) => plan[name] != null).map((name) => plan[name]);
    const el = h("article", { class: "plan", data: { episode: plan.episode, step: plan.env_step } },
      h("h4", {}, title || `${atlas.number(plan.maximum)} `, plan.share != null ? h("span", { class: "soft" }, `at ${Math.round(plan.share * 100)} % of its plans`) : null),
      h("p", {}, about.rollouts && plan.episode != null ? h("a", { href: atlas.link("episodes", [about.rollouts, String(plan.episode)], { step: plan.env_step }) },
        `episode ${plan.episode}, step ${plan.env_step}`) : `episode ${plan.episode}, step ${plan.env_step}`, labels.length ? `: ${labels.join(", ")}` : ""));
    if (!plan.maps.length) return el;
    const images = h("div", { class: "pictures" });
    el.append(images);
    for (const map of plan.maps) {
      const values = reduced(map, step);
      if (map.camera != null) {
        images.append(h("figure", { data: { camera: map.camera } }, h("div", { class: "picture" }, overlay(map, values, one)), h("figcaption", {}, `${map.segment} ${largest(values)}`)));
      } else if (values.some((v) => v > 0)) el.append(strip(map, values, one, step));
    }
    const silent = plan.maps.filter((map) => map.camera == null && !reduced(map, step).some((v) => v > 0)).map((map) => map.segment);
    if (silent.length) el.append(h("p", { class: "soft" }, `0 on ${silent.join(", ")}`));
    return el;
  }
  function reduced(map, step) {
    const at = map.denoise_steps.indexOf(Number(step));
    if (step !== "" && at >= 0) return map.values[at];
    return map.values[0].map((_, token) => Math.max(...map.values.map((row) => row[token] ?? 0)));
  }
  const largest = (values) => { const top = Math.max(0, ...values); return top ? `max ${atlas.number(top)}` : "0"; };
  /* a row of cells, one a token; with denoise steps, all of them below one another */
  function strip(map, values, one, step) {
    const all = step === "" && map.denoise_steps.length > 1, rows = all ? map.values : [values];
    const said = `${map.segment}: ${values.length} tokens${all ? ` × ${rows.length} denoise steps, the first at the top` : ""}, ${largest(values)}`;
    const cell = (v, token, at) => h("span", { title: `${map.segment} ${token}${all ? `, denoise step ${map.denoise_steps[at]}` : ""}: ${atlas.number(v)}`,
      style: { background: atlas.shade(v, 0, one.maximum).background } });
    return h("figure", {}, h("figcaption", {}, said), h("div", { role: "img", "aria-label": `${map.segment}, largest of each token: ${values.map((v) => atlas.number(v)).join(", ")}` },
      rows.map((row, at) => h("div", { class: all ? "strip low" : "strip" }, row.map((v, token) => cell(v, token, at))))));
  }
  function overlay(map, values, one) {
    const canvas = h("canvas", { width: 300, height: 300, role: "img", "aria-label": `${map.segment}: ${largest(values)} of ${values.length} tokens` });
    canvas.paint = (grid, pictured) => {
      const c = canvas.getContext("2d"), side = Math.round(Math.sqrt(values.length));
      const known = grid && grid.n_before + grid.grid[0] * grid.grid[1] === values.length;
      c.clearRect(0, 0, 300, 300);
      if (!known && side * side !== values.length) return;
      const rows = known ? grid.grid[0] : side, columns = known ? grid.grid[1] : side;
      values.slice(known ? grid.n_before : 0).forEach((value, token) => {
        const at = known ? grid.order[token] : token, row = Math.floor(at / columns), column = at % columns;
        const y = known ? grid.rows[row] : [row / rows, (row + 1) / rows], x = known ? grid.columns[column] : [column / columns, (column + 1) / columns];
        if (!x || !y) return;
        c.globalAlpha = pictured ? (value > 0 ? 0.35 + 0.4 * Math.min(1, value / one.maximum) : 0) : 1;
        c.fillStyle = atlas.shade(value, 0, one.maximum).background;
        const [left, top] = [Math.round(300 * x[0]), Math.round(300 * y[0])];
        c.fillRect(left, top, Math.round(300 * x[1]) - left, Math.round(300 * y[1]) - top);
      });
      c.globalAlpha = 1;
    };
    canvas.paint(null, false);
    return canvas;
  }
  async function pictures(about, body, note, current) {
    const cards = [...body.querySelectorAll(".plan")], failed = new Set();
    let grids = { grids: [], error: null };
    const paths = `features/${about.key}`;
    try {
      if (about.rollouts && atlas.has(`${paths}/grids`)) grids = await atlas.get(`${paths}/grids`);
    } catch (error) { grids = { grids: [], error: error.message }; }
    // one episode after the other: each is run again
    for (const each of cards) {
      if (!current()) return;
      const { episode, step } = each.dataset;
      let found;
      try {
        if (!atlas.has(`${paths}/pictures/${episode}`)) throw new Error("This copy holds no camera images of some of these plans.");
        found = await atlas.get(`${paths}/pictures/${episode}`);
      } catch (error) { found = { cameras: [], steps: [], error: error.message }; }
      if (!current()) return;
      if (found.error) failed.add(found.error);
      const source = (camera) => atlas.url(`${paths}/picture/${episode}/${step}/${camera}`, "png");
      if (!each.querySelector("[data-camera]") && found.steps.includes(Number(step))) {
        // no token of it is an image's: the images tell what went on
        each.querySelector(".pictures").append(...found.cameras.map((name, i) => h("figure", {}, h("div", { class: "picture" },
          h("img", { alt: `what the camera ${name} showed`, src: source(i) })), h("figcaption", {}, name))));
      }
      for (const figure of each.querySelectorAll("[data-camera]")) {
        const grid = grids.grids.find((one) => one.camera === figure.dataset.camera), canvas = figure.querySelector("canvas");
        const camera = found.cameras.indexOf(grid ? grid.source : figure.dataset.camera);
        const shown = !found.error && camera >= 0 && found.steps.includes(Number(step));
        if (shown) {
          figure.querySelector(".picture").prepend(h("img", { alt: "", src: source(camera) }));
        }
        canvas.paint(grid, shown);
        if (shown && !grid) failed.add("Tokens are taken to be a square over the whole image.");
      }
    }
    if (grids.error) failed.add(grids.error);
    if (failed.size) note.append(" ", [...failed].join(" "));
  }

  /* over the steps of episodes */
  function course(el, about, one) {
    if (!one.episodes.length) return;
    const plot = h("div", {}), chosen = h("div", { class: "plans" });
    el.append(h("h2", {}, "Over the steps of the episodes in which it is largest"), plot,
      atlas.live && about.pooling === "token" ? h("p", { class: "soft" }, "Click a point to see its tokens.") : "", chosen,
      atlas.table({ caption: "Episodes", label: "Episodes", file: `${one.files}/peaks.parquet`, rows: one.episodes, columns: [
        { name: "episode", number: true, cell: (row) => (about.rollouts ? h("a", { href: atlas.link("episodes", [about.rollouts, String(row.episode)], { step: row.env_step }) }, row.episode) : row.episode) },
        { name: "task" }, { name: "seed", number: true }, { name: "maximum", number: true }, { name: "env_step", title: "at step", number: true },
        { name: "active", title: "of its plans", number: true },
      ] }));
    requestAnimationFrame(async () => {
      if (!plot.isConnected) return;
      const phased = one.episodes.some((each) => each.course.phases);
      await atlas.plot(plot, one.episodes.map((each, i) => ({ type: "scatter", mode: "lines+markers", name: `episode ${each.episode}`, x: each.course.steps,
        y: each.course.values, text: each.course.steps.map((_, at) => (phased && each.course.phases && each.course.phases[at]) || ""), marker: { size: 5 },
        line: { dash: ["solid", "dot", "dash", "dashdot", "longdash"][i % 5] }, hovertemplate: "step %{x}: %{y:.3g} %{text}<extra>%{fullData.name}</extra>" })),
      { height: 280, xaxis: { title: { text: "environment step" }, rangemode: "tozero" }, yaxis: { title: { text: "largest of the plan's rows" }, rangemode: "tozero" },
        legend: { orientation: "h", y: -0.25 } }, { label: "Activation over the steps of the episodes that the table below lists" });
      if (!atlas.live || about.pooling !== "token") return;
      plot.on("plotly_click", async ({ points: [point] }) => {
        const episode = one.episodes[point.curveNumber].episode;
        try {
          const plan = await atlas.get(`features/${about.key}/feature/${one.feature}/plan/${episode}/${point.x}`);
          const note = h("p", { class: "soft" });
          chosen.replaceChildren(card(about, one, plan, ""), note);
          await pictures(about, chosen, note, () => chosen.isConnected);
        } catch (error) { chosen.replaceChildren(atlas.empty("This cannot be shown", error.message)); }
      });
    });
  }

  /* what steering it did */
  async function steering(el, about, one) {
    el.append(h("h2", {}, "Steering"));
    let runs = [];
    try {
      runs = await atlas.get(`features/${about.key}/feature/${one.feature}/steering`);
    } catch (error) {
      el.append(atlas.empty("This cannot be shown", error.message));
      return;
    }
    if (!runs.length) {
      el.append(h("p", { class: "soft" }, "Not measured in this run. ", h("code", {}, `hooked-vla sae steer --model ${about.model} --sae SAE --feature ${one.feature} --episodes 36 --out RUN/steered`), " measures it."));
      return;
    }
    for (const run of runs) el.append(doses(run));
  }
  function doses(run) {
    const at = (row, axis) => (row.shift ? row.shift[axis] : null);
    const section = h("div", {}, h("h3", {}, h("a", { href: atlas.link("episodes", [run.rollouts]) }, run.path), run.suite ? ` in the suite ${run.suite}` : ""));
    if (run.error) section.append(h("p", { class: "soft" }, `No shifts: ${run.error}`));
    const directions = [...new Set(run.rows.filter((row) => row.rho != null && row.direction !== "sham").map((row) => row.direction))];
    const sham = run.rows.find((row) => row.direction === "sham");
    const measures = [...run.axes.map((name, axis) => ({ title: `shift along ${name} (m)`, of: (row) => at(row, axis), zero: true })),
      { title: "success", of: (row) => (row.success == null ? null : { mean: row.success, low: row.success_low, high: row.success_high }), range: [-0.03, 1.03] }];
    const grid = h("div", { class: "feature-doses" });
    section.append(grid);
    for (const measure of measures) {
      const el = h("div", {});
      const traces = directions.map((direction, i) => {
        const points = [...(sham ? [sham] : []), ...run.rows.filter((row) => row.direction === direction && row.rho != null)].sort((a, b) => a.rho - b.rho)
          .map((row) => ({ rho: row.rho, ...measure.of(row) })).filter((point) => point.mean != null);
        return { type: "scatter", mode: "lines+markers", name: direction, x: points.map((p) => p.rho), y: points.map((p) => p.mean), marker: { symbol: i ? "circle-open" : "circle" },
          line: { color: i ? atlas.palette[7] : atlas.palette[0], dash: i ? "dot" : "solid" },
          error_y: { type: "data", symmetric: false, array: points.map((p) => (p.high == null ? 0 : p.high - p.mean)), arrayminus: points.map((p) => (p.low == null ? 0 : p.mean - p.low)), thickness: 1 },
          hovertemplate: "ρ %{x}: %{y:.3g}<extra>%{fullData.name}</extra>" };
      });
      if (!traces.some((trace) => trace.x.length)) continue;
      grid.append(h("figure", {}, h("figcaption", {}, measure.title), el));
      requestAnimationFrame(() => el.isConnected && atlas.plot(el, traces, { height: 240, xaxis: { title: { text: "ρ, lengths of the token; 0: sham" } }, yaxis: { range: measure.range },
        legend: { orientation: "h", y: -0.35 } }, { label: `${measure.title} by dose; the table below has the numbers` }));
    }
    const shift = (axis) => ({ name: `shift ${run.axes[axis]}`, number: true, cell: (row) => (at(row, axis) ? [atlas.number(at(row, axis).mean), h("div", { class: "soft" }, atlas.interval(at(row, axis).low, at(row, axis).high))] : "") });
    section.append(atlas.table({ caption: "Every arm, beside its controls", label: "Arms", file: run.file, rows: run.rows, columns: [
      { name: "arm" }, { name: "n", number: true }, { name: "success", number: true, cell: (row) => [atlas.number(row.success), h("div", { class: "soft" }, atlas.interval(row.success_low, row.success_high))] },
      { name: "displacement", title: "displacement (m)", number: true }, ...run.axes.map((_, axis) => shift(axis)), { name: "cosine", title: "cosine of actions", number: true }, { name: "unchanged", title: "unchanged episodes", number: true },
    ] }));
    return section;
  }

  atlas.showFeature = showFeature;
  atlas.featureKeys = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!here || !by || !/^#\/features\/[^/?]+\/\d+/.test(location.hash) || event.target.closest(".scroll, .dots, .plot")) return false;
    const to = here.number + by;
    if (to < 0 || to >= here.n || !atlas.has(`features/${here.about.key}/feature/${to}`)) return false;
    atlas.go("features", [here.about.key, String(to)]);
    return true;
  };
})();
