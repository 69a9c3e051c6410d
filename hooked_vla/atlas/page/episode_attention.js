/* Where the policy looks, drawn over what it saw: asked for at every plan that the reader stops at. */
"use strict";
window.atlasEpisodes = window.atlasEpisodes || {};
(() => {
  const { h, choose, badge, number } = atlas;
  // differences of a plan that is made again that other last bits explain, in units of actions
  const SAME = 1e-3;

  /* sides: [{side, label, rollout, episode, canvas, n_action_steps}]; params: site, head, asks, denoise of the address;
     changed(params): what to write into it; camera(): the camera that is shown. */
  function attention({ sides, params, changed, camera }) {
    const wanted = { site: params.site, head: params.head || "mean", asks: params.asks, denoise: params.denoise || "last" };
    const controls = h("div", { class: "fields" }), says = h("div", { class: "ep-attention-says", "aria-live": "polite" });
    const el = h("div", { class: "ep-attention", hidden: true }, controls, says);
    let on = false, at = null, turn = 0, later = 0, choices = null;

    function show(now) {
      on = now;
      el.hidden = !on;
      if (!on) sides.forEach(clear);
      else { at = null; step(current); }
    }
    let current = 0;
    function step(now) {
      current = now;
      if (!on) return;
      const plan = sides[0].n_action_steps > 0 ? now - (now % sides[0].n_action_steps) : now;
      if (plan === at) return;
      at = plan;
      clearTimeout(later);
      later = setTimeout(load, 180);
    }
    async function load() {
      const mine = ++turn;
      says.replaceChildren(h("p", { class: "soft" }, "Running the policy again at this step …"));
      const found = await Promise.all(sides.map((side) => askedAt(side)));
      if (mine !== turn || !on) return;
      choices = found.find((each) => !each.error && each.sites) || null;
      settle();
      await maps(mine, found);
    }
    const base = (side) => `rollouts/${side.rollout}/episode/${side.episode}/attention/${Math.min(at, side.last)}`;
    async function askedAt(side) {
      if (current > side.n) return { error: "This episode is over." };
      const path = base(side);
      if (!atlas.has(path)) return { error: "This copy holds maps of a few steps of the first episodes only." };
      try { return await atlas.get(path); } catch (error) { return { error: error.message }; }
    }
    function settle() {
      if (!choices) { controls.replaceChildren(); return; }
      const sites = choices.sites.filter((each) => each.sees);
      const fallback = sites.filter((each) => each.reaches_action).pop() || sites[0];
      const site = sites.find((each) => each.site === wanted.site) || fallback;
      if (!site) { controls.replaceChildren(); return; }
      wanted.site = site.site;
      if (!site.queries.includes(wanted.asks)) wanted.asks = site.queries[site.queries.length - 1];
      const heads = [["mean", "mean of all"], ...Array.from({ length: site.n_heads }, (_, i) => [String(i), `head ${i}`])];
      const steps = site.n_steps < 2 ? null : [["last", "last"], ["mean", "mean of all"], ...Array.from({ length: site.n_steps }, (_, i) => [String(i), `step ${i}`])];
      if (!heads.some(([key]) => key === wanted.head)) wanted.head = "mean";
      if (!steps || !steps.some(([key]) => key === wanted.denoise)) wanted.denoise = "last";
      const changes = (name) => (value) => { wanted[name] = value; changed({ ...wanted }); settle(); maps(++turn); };
      const focused = document.activeElement && controls.contains(document.activeElement) ? document.activeElement.dataset.name : null;
      controls.replaceChildren(
        choose({ label: "Layer", value: wanted.site, change: changes("site"), options: sites.map((each) => [each.site,
          each.site.replace(".hook_pattern", "") + (each.reaches_action ? "" : " (dead end)")]) }),
        choose({ label: "Head", value: wanted.head, change: changes("head"), options: heads }),
        choose({ label: "Who asks", value: wanted.asks, change: changes("asks"), options: site.queries.map((each) => [each, each === "all" ? "all tokens" : each]) }),
        steps ? choose({ label: "Denoise step", value: wanted.denoise, change: changes("denoise"), options: steps }) : "");
      controls.querySelectorAll("select").forEach((select, i) => { select.dataset.name = String(i); });
      if (focused != null) controls.querySelector(`[data-name="${focused}"]`)?.focus();
      wanted.dead = !site.reaches_action;
    }
    let drawn = [];
    async function maps(mine, found) {
      found = found || (await Promise.all(sides.map(askedAt)));
      drawn = await Promise.all(sides.map(async (side, i) => {
        if (found[i].error) return { error: found[i].error };
        const path = `${base(side)}/${wanted.site}/${wanted.asks.replace(":", "~")}`;
        if (!atlas.has(path)) return { error: "This copy does not hold this map." };
        try {
          const map = await atlas.get(path);
          return map.error ? { error: map.error } : { ...map, cameras: found[i].cameras };
        } catch (error) { return { error: error.message }; }
      }));
      if (mine === turn && on) paint();
    }
    function pick(map) {
      const steps = wanted.denoise === "mean" ? map.weights.map((_, i) => i) : [wanted.denoise === "last" ? map.weights.length - 1 : Math.min(Number(wanted.denoise), map.weights.length - 1)];
      const grid = map.weights[0][0].map((row) => row.map(() => 0)), even = grid.map((row) => row.map(() => 0));
      let share = 0;
      for (const t of steps) {
        const heads = wanted.head === "mean" ? map.weights[t].map((_, i) => i) : [Math.min(Number(wanted.head), map.weights[t].length - 1)];
        for (const head of heads) {
          const part = 1 / (steps.length * heads.length);
          share += map.share[t][head] * part;
          grid.forEach((row, r) => row.forEach((_, c) => { row[c] += map.weights[t][head][r][c] * part; even[r][c] += map.uniform[t][r][c] * part; }));
        }
      }
      return { grid, even, share };
    }
    function paint() {
      const name = camera();
      const shown = drawn.map((each) => {
        const map = !each.error && each.maps.find((one) => one.camera === name);
        return map ? { ...each, map, ...pick(map) } : each;
      });
      // as multiples of even attention, on one scale for both: they are compared
      const times = (each) => each.grid.flatMap((row, r) => row.map((value, c) => (each.even[r][c] > 0 ? value / each.even[r][c] : 1)));
      const reach = Math.max(0.1, ...shown.filter((each) => each.grid).flatMap(times).map((value) => Math.abs(value - 1)));
      shown.forEach((each, i) => (each.grid ? overlay(sides[i].canvas, each, name, reach) : clear(sides[i])));
      says.replaceChildren(...shown.map((each, i) => h("p", {}, h("span", { class: `ep-side side-${sides[i].side}` }, sides[i].label), " ", said(each, name))),
        shown.some((each) => each.grid) ? h("p", { class: "soft" }, `Red tokens get up to ${number(1 + reach)} times what even attention would give them, blue ones less than even. A map says what is read, not what it is used for.`,
          wanted.dead ? [" ", badge("dead end"), " No action depends on this layer's attention."] : null) : "");
    }
    const percent = (share) => `${number(100 * share)} %`;
    function said(each, name) {
      if (each.error) return each.error;
      if (!each.grid) return `The model sees no camera ${name}.`;
      let best = [0, 0];
      each.grid.forEach((row, r) => row.forEach((value, c) => { if (value > each.grid[best[0]][best[1]]) best = [r, c]; }));
      const [r, c] = best, even = each.even[r][c];
      const text = [`Plan of step ${each.step}: ${percent(each.share)} of the attention goes to ${name}; most to row ${r + 1}, column ${c + 1} of ${each.map.grid.join(" × ")}: ${percent(each.grid[r][c])}`,
        even > 0 ? `, ${number(each.grid[r][c] / even)} times even attention. ` : ". "];
      if (!each.edits.applied) return [...text, badge("not judged", "without the arm's edit"), ` ${each.edits.why}: this is the unedited policy on what the episode saw.`];
      return each.apart > SAME
        ? [...text, badge("damaged", "other plan"), ` made again, the plan is up to ${number(each.apart)} from the recorded actions.`]
        : [...text, h("span", { class: "soft" }, `Made again, the plan is the recorded one to ${number(each.apart)}.`)];
    }
    function overlay(canvas, each, name, reach) {
      const picture = each.cameras.find((one) => one.camera === name);
      const image = new Image();
      image.onload = () => {
        canvas.width = 512;
        canvas.height = Math.round((512 * image.height) / image.width);
        const pen = canvas.getContext("2d");
        pen.imageSmoothingEnabled = false;
        pen.filter = "grayscale(1)";
        pen.drawImage(image, 0, 0, canvas.width, canvas.height);
        pen.filter = "none";
        pen.globalAlpha = 0.55;
        const edge = (span, size) => span && [Math.round(span[0] * size), Math.round(span[1] * size)];
        each.map.rows.forEach((rows, r) => each.map.columns.forEach((columns, c) => {
          const across = edge(columns, canvas.width), down = edge(rows, canvas.height);
          if (!across || !down) return;
          const even = each.even[r][c];
          pen.fillStyle = atlas.shade(even > 0 ? each.grid[r][c] / even : 1, 1 - reach, 1 + reach, true).background;
          pen.fillRect(across[0], down[0], across[1] - across[0], down[1] - down[0]);
        }));
        pen.globalAlpha = 1;
        canvas.hidden = !on;
      };
      image.src = picture.image;
      canvas.setAttribute("aria-label", `Attention to ${name}, plan of step ${each.step}`);
    }
    const clear = (side) => { side.canvas.hidden = true; };
    const playing = (now) => { if (now && on) { sides.forEach(clear); at = null; clearTimeout(later); turn += 1; } };
    return { el, show, step, paint: () => on && drawn.length && paint(), playing, get on() { return on; } };
  }
  window.atlasEpisodes.attention = attention;
})();
