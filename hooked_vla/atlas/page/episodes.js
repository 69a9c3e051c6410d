/* Lists: folders of rollouts, and the episodes of one with the success of its arms. One episode is drawn by episode_show.js. */
"use strict";
(() => {
  const { h, s, table, badge, choose, empty, number, interval, source } = atlas;
  const { outcome } = window.atlasEpisodes;
  let opened = null;

  // an index that is made meanwhile gives another answer each time
  const now = (path) => atlas.get(path, atlas.live ? { at: Date.now() } : undefined);
  const percent = (share) => `${number(100 * share)} %`;

  async function folders(el) {
    const found = await atlas.get("rollouts");
    if (!found.length) {
      el.replaceChildren(empty("No rollouts here", "Episodes come from `hooked-vla rollouts --out`, and from experiments, which keep theirs under rollouts/."));
      return true;
    }
    if (found.length === 1 && !found[0].error) return false;
    const several = (row) => !row.error && row.n_arms > 1 && row.edited != null;
    el.replaceChildren(h("h1", {}, "Episodes"), h("p", { class: "soft" }, "Every folder of rollouts in this run: a policy that acted in a suite's tasks, unedited and under each arm, from the same starts."), table({
      caption: "Rollouts", rows: found, columns: [
        { name: "path", title: "folder", cell: (row) => (row.error ? [h("code", {}, row.path)] : h("a", { href: atlas.link("episodes", [row.key]), class: "open" }, row.path)) },
        { name: "model", cell: (row) => row.model || badge("damaged") },
        { name: "suite", cell: (row) => row.suite || row.error },
        { name: "n_tasks", title: "tasks", number: true }, { name: "n_arms", title: "arms", number: true },
        { name: "planned", title: "episodes", number: true },
        { name: "compare", title: "side by side", cell: (row) => (several(row) ? h("a", { href: atlas.link("episodes", [row.key, row.edited]) }, "edited and baseline") : "") },
      ] }));
    atlas.arrows(el, "a.open");
    return true;
  }

  /* a share with its interval, as a line and a dot */
  function bar(rate) {
    const x = (share) => 2 + share * 116;
    return s("svg", { width: 120, height: 14, role: "img", "aria-label": `${percent(rate.rate)}, ${percent(rate.low)} to ${percent(rate.high)}`, class: "ep-rate" },
      s("line", { x1: x(0), x2: x(1), y1: 7, y2: 7, class: "ep-grid" }), s("line", { x1: x(rate.low), x2: x(rate.high), y1: 7, y2: 7, class: "ep-interval" }),
      s("circle", { cx: x(rate.rate), cy: 7, r: 4, class: "ep-share" }));
  }

  function success(el, rollout, about, filter) {
    const { index } = about;
    if (index.error) { el.replaceChildren(empty("No success rates", index.error)); return; }
    if (!about.rates) {
      el.replaceChildren(h("p", { role: "status" }, `Reading ${index.of || about.n} episodes for their success: ${index.done} so far. `, h("progress", { max: index.of || 1, value: index.done, "aria-label": "Episodes read" })));
      return;
    }
    const overall = about.rates.filter((rate) => rate.task === null), tasks = Object.keys(about.tasks);
    const link = (params, text) => h("a", { href: atlas.link("episodes", [rollout], { ...filter, page: "", ...params }) }, text);
    const arms = table({ caption: "Success by arm", file: about.files, rows: overall, columns: [
      { name: "arm", cell: (rate) => link({ arm: rate.arm, task: "" }, rate.arm) },
      { name: "what", title: "what it does", cell: (rate) => h("span", { class: "ep-what" }, about.arms[rate.arm] ? about.arms[rate.arm].text : "not in the manifest") },
      { name: "episodes", number: true },
      { name: "rate", title: "success", number: true, cell: (rate) => percent(rate.rate) },
      { name: "bar", title: "0 to 100 %", cell: bar },
      { name: "interval", title: "95 % interval (Wilson), %", number: true, cell: (rate) => interval(100 * rate.low, 100 * rate.high) },
    ] });
    const at = new Map(about.rates.map((rate) => [`${rate.arm}\n${rate.task}`, rate]));
    const by = tasks.length < 2 ? null : h("details", { class: "ep-by" }, h("summary", {}, "By task"), table({ caption: "Success by arm and task, %", file: about.files, rows: overall, columns: [
      { name: "arm" }, ...tasks.map((task) => ({ name: task, number: true, cell: (rate) => {
        const one = at.get(`${rate.arm}\n${task}`);
        if (!one) return "";
        const shade = atlas.shade(one.rate, 0, 1);
        const cell = link({ arm: rate.arm, task }, number(100 * one.rate));
        cell.title = `${one.successes} of ${one.episodes}; 95 % interval ${interval(100 * one.low, 100 * one.high)} %`;
        cell.className = "ep-cell";
        Object.assign(cell.style, shade);
        return cell;
      } })) ] }));
    el.replaceChildren(arms, by || "");
  }

  async function list(el, rollout, about, filter, fresh) {
    const filtered = filter.arm || filter.task || filter.outcome || filter.order;
    const page = String(filter.page || 1);
    let found;
    if (filtered && !atlas.live) found = await held(rollout, about, filter);
    else found = filtered ? await atlas.get(`rollouts/${rollout}/find`, { ...filter, page }) : await now(`rollouts/${rollout}/page/${page}`);
    if (!fresh()) return;
    const to = (n) => atlas.link("episodes", [rollout], { ...filter, page: n === 1 ? "" : n });
    const pages = found.pages < 2 ? null : h("nav", { class: "ep-pages", "aria-label": "Pages" },
      found.page > 1 ? h("a", { href: to(found.page - 1), rel: "prev" }, "← before") : h("span", { class: "soft" }, "← before"), h("span", {}, `page ${found.page} of ${found.pages}`),
      found.page < found.pages ? h("a", { href: to(found.page + 1), rel: "next" }, "next →") : h("span", { class: "soft" }, "next →"));
    el.replaceChildren(found.note ? h("p", { class: "soft" }, found.note) : "", found.rows.length ? table({ caption: `${found.n} episodes${filtered ? ", of those chosen" : ""}`, file: about.files, rows: found.rows, columns: [
      { name: "episode", number: true, cell: (row) => (row.damage ? row.episode : h("a", { class: "open", href: atlas.link("episodes", [rollout, row.episode]) }, row.episode)) },
      { name: "arm", cell: (row) => (row.damage ? [badge("damaged"), ` ${row.damage}`] : row.arm) }, { name: "task" }, { name: "seed", number: true },
      { name: "success", title: "ending", cell: (row) => (row.damage ? "" : outcome(row)) },
      { name: "n_steps", title: "steps", number: true }, { name: "instruction" },
    ] }) : empty("No such episodes", "None of them is of this arm, task and outcome."), pages || "");
    atlas.arrows(el, "a.open");
  }

  /* what a copy without a server can choose from */
  async function held(rollout, about, filter) {
    const rows = [];
    const n = Math.ceil(about.n / about.per_page);
    let pages = 0;
    for (let page = 1; page <= n && atlas.has(`rollouts/${rollout}/page/${page}`); page += 1, pages += 1) rows.push(...(await atlas.get(`rollouts/${rollout}/page/${page}`)).rows);
    const fits = rows.filter((row) => (!filter.arm || row.arm === filter.arm) && (!filter.task || row.task === filter.task)
      && (!filter.outcome || (filter.outcome === "damaged" ? row.damage : !row.damage && row.success === (filter.outcome === "success"))));
    const orders = { longest: (a, b) => b.n_steps - a.n_steps, shortest: (a, b) => a.n_steps - b.n_steps, task: (a, b) => (a.task < b.task ? -1 : a.task > b.task ? 1 : a.seed - b.seed) };
    if (orders[filter.order]) fits.sort(orders[filter.order]);
    const page = Number(filter.page || 1), size = about.per_page;
    return { rows: fits.slice((page - 1) * size, page * size), n: fits.length, page, pages: Math.max(1, Math.ceil(fits.length / size)),
      note: pages < n ? `This copy holds ${rows.length} of ${about.n} episodes; only those are searched.` : "" };
  }

  async function rollouts(el, rollout, params, fresh) {
    const about = await now(`rollouts/${rollout}`);
    if (!fresh()) return;
    const filter = { arm: params.arm || "", task: params.task || "", outcome: params.outcome || "", order: params.order || "", page: params.page || "" };
    const change = (name) => (value) => atlas.go("episodes", [rollout], { ...filter, page: "", [name]: value });
    const rates = h("div", { class: "ep-arms" }), rows = h("div");
    el.replaceChildren(h("nav", { "aria-label": "Where this is" }, h("a", { href: atlas.link("episodes") }, "all rollouts")), h("h1", {}, about.path === "." ? "Rollouts" : about.path),
      h("p", { class: "soft" }, `${about.model} in the suite ${about.suite}: ${about.n} of ${about.planned} episodes recorded, up to ${about.max_steps} steps at ${about.fps} a second.`),
      about.edited == null ? "" : h("p", {}, h("a", { href: atlas.link("episodes", [rollout, about.edited]) }, "Edited and baseline side by side"), ", from the same start."), rates,
      h("h2", {}, "Episodes"), h("div", { class: "fields", role: "search" },
        choose({ label: "Arm", value: filter.arm, options: [["", "all"], ...Object.keys(about.arms)], change: change("arm") }),
        choose({ label: "Task", value: filter.task, options: [["", "all"], ...Object.keys(about.tasks)], change: change("task") }),
        choose({ label: "Outcome", value: filter.outcome, options: [["", "all"], "success", "failure", "damaged"], change: change("outcome") }),
        choose({ label: "Order", value: filter.order, options: [["", "by number"], ["task", "by task and seed"], ["longest", "longest first"], ["shortest", "shortest first"]], change: change("order") })), rows);
    success(rates, rollout, about, filter);
    await list(rows, rollout, about, filter, fresh).catch((error) => rows.replaceChildren(empty("These cannot be shown", error.message)));
    if (!about.rates && !about.index.error && atlas.live) watch(rates, rollout, filter, fresh);
  }
  /* until the index is made */
  async function watch(el, rollout, filter, fresh) {
    for (;;) {
      await new Promise((resolve) => setTimeout(resolve, 600));
      if (!fresh() || !el.isConnected) return;
      const about = await now(`rollouts/${rollout}`).catch(() => null);
      if (!about || !fresh() || !el.isConnected) return;
      success(el, rollout, about, filter);
      if (about.rates || about.index.error) return;
    }
  }

  atlas.view("episodes", {
    title: "Episodes",
    key: "e",
    async show(el, parts, params, fresh) {
      this.hide();
      if (parts.length > 1) { opened = await window.atlasEpisodes.show(el, parts[0], parts[1], params, fresh); return; }
      let rollout = parts[0];
      if (!rollout) {
        if (await folders(el)) return;
        [{ key: rollout }] = await atlas.get("rollouts");
      }
      await rollouts(el, rollout, params, fresh);
    },
    hide() {
      if (opened) opened.hide();
      opened = null;
    },
    keys: (event) => Boolean(opened && opened.keys(event)),
  });
})();
