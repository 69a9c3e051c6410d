/* Live: a policy acts on this machine, as it is and edited, from the same start, step by step as it happens. */
"use strict";
(() => {
  const { h, choose, badge, empty, number } = atlas;
  const KINDS = { patch: "patch a site from another task", ablate: "ablate a site (zero)", steer: "steer an SAE feature" };
  const NAMES = { unedited: "Unedited", edited: "Edited", donor: "Patched from" };
  const SIDES = { unedited: "other", edited: "own", donor: "donor" };
  let close = null, options = null, alive = false, running = false, loading = 0;
  // sites are listed by the process that acts, which does one thing at a time
  const settle = () => document.querySelectorAll(".lv-run").forEach((button) => { button.disabled = running || loading > 0; });

  /* the form: what it says is the address too, so that a link asks for the same rollout */
  function form(el, params, begin) {
    const wanted = read(params);
    let sites = [], cameras = [];
    const note = h("p", { class: "lv-problem", role: "alert" });
    async function loadSites() {
      if (!wanted.edits.length) return;
      loading += 1;
      settle();
      try { ({ sites, cameras } = await atlas.get("live/sites", { model: wanted.model })); note.textContent = ""; } catch (error) { sites = []; note.textContent = error.message; } finally { loading -= 1; settle(); }
    }
    function field(label, node) {
      const id = `live-${label.replace(/\W+/g, "-").toLowerCase()}-${(fields += 1)}`;
      node.id = id;
      return h("span", { class: "field" }, h("label", { for: id }, label), node);
    }
    let fields = 0;
    const input = (label, value, change, attributes) => field(label, h("input", { type: "text", value: value ?? "", autocomplete: "off", ...attributes, on: { input: (event) => { change(event.target.value); say(); } } }));
    const say = () => atlas.replace([], write(wanted));
    function edit(each, i) {
      const again = (name) => (value) => { each[name] = value; draw(); };
      const site = sites.find((one) => one.site === each.site) || sites.find((one) => one.site.endsWith("hook_resid_post")) || sites[0];
      const saes = options.saes.filter((one) => one.model === wanted.model);
      if (each.edit !== "steer" && site) each.site = site.site;
      if (each.edit === "steer" && saes.length && !saes.some((one) => one.name === each.sae)) each.sae = saes[0].name;
      const at = each.edit === "steer" ? sites.find((one) => one.site === saes.find((sae) => sae.name === each.sae)?.site) : site;
      if (at && each.tokens && !at.tokens.includes(each.tokens)) each.tokens = "";
      const tasks = Object.keys(options.suites[wanted.suite]);
      if (each.edit === "patch" && !tasks.includes(each.task)) each.task = tasks.find((task) => task !== wanted.task) || tasks[0];
      return h("fieldset", { class: "lv-edit" }, h("legend", {}, `Edit ${i + 1}`), h("div", { class: "fields" },
        choose({ label: "What", value: each.edit, options: Object.entries(KINDS).filter(([kind]) => kind !== "steer" || saes.length), change: again("edit") }),
        each.edit === "steer"
          ? [choose({ label: "Autoencoder", value: each.sae, options: saes.map((one) => one.name), change: again("sae") }),
            input("Feature", each.feature, (value) => { each.feature = value; }, { inputmode: "numeric", size: 7, title: `0 to ${(saes.find((one) => one.name === each.sae)?.n_features ?? 1) - 1}` }),
            input("Times", each.scale, (value) => { each.scale = value; }, { inputmode: "decimal", size: 5 }), input("Plus", each.shift, (value) => { each.shift = value; }, { inputmode: "decimal", size: 5 })]
          : choose({ label: "Site", value: each.site, options: sites.length ? sites.map((one) => [one.site, one.site + (one.reaches_action ? "" : " (dead end)")]) : [["", "…"]], change: again("site") }),
        choose({ label: "Tokens", value: each.tokens, options: [["", "all"], ...(at ? at.tokens : [])], change: again("tokens") }),
        each.edit === "patch" ? choose({ label: "From the task", value: each.task, options: tasks, change: again("task") }) : null,
        h("button", { type: "button", on: { click: () => { wanted.edits.splice(i, 1); draw(); } } }, "Remove")));
    }
    function draw() {
      const tasks = options.suites[wanted.suite];
      if (!(wanted.task in tasks)) wanted.task = Object.keys(tasks)[0];
      const again = (name) => (value) => { wanted[name] = value; draw(); };
      const image = options.images.find((one) => one.kind === wanted.image);
      const focused = document.activeElement && el.contains(document.activeElement) ? document.activeElement.id : "";
      fields = 0;
      el.replaceChildren(h("form", { on: { submit: (event) => { event.preventDefault(); begin(body(wanted), note); } } },
        h("div", { class: "fields" },
          choose({ label: "Policy", value: wanted.model, options: options.models, change: async (value) => { wanted.model = value; await loadSites(); draw(); } }),
          choose({ label: "Suite", value: wanted.suite, options: Object.keys(options.suites), change: again("suite") }),
          choose({ label: "Task", value: wanted.task, options: Object.entries(tasks).map(([task, text]) => [task, text]), change: again("task") }),
          input("Seed", wanted.seed, (value) => { wanted.seed = value; }, { inputmode: "numeric", size: 7 }),
          input("Steps at most", wanted.max_steps, (value) => { wanted.max_steps = value; }, { inputmode: "numeric", size: 5 })),
        h("div", { class: "fields" },
          input("Prompt of the edited one", wanted.prompt, (value) => { wanted.prompt = value; }, { placeholder: tasks[wanted.task], class: "lv-prompt", maxlength: 300 }),
          choose({ label: "Its pictures", value: wanted.image, options: [["", "as they are"], ...options.images.map((one) => [one.kind, `${one.kind.replaceAll("_", " ")}: ${one.text}`])], change: again("image") }),
          image && image.graded ? input("Strength", wanted.strength, (value) => { wanted.strength = value; }, { inputmode: "decimal", size: 5 }) : null),
        wanted.edits.map(edit),
        h("div", { class: "fields" },
          wanted.edits.length < options.max_edits ? h("button", { type: "button", on: { click: async () => { wanted.edits.push({ edit: "patch", tokens: "", feature: "0", scale: "1", shift: "1" }); if (!sites.length) await loadSites(); draw(); } } }, "Add an edit") : null,
          h("button", { type: "submit", class: "primary lv-run", disabled: running || loading > 0 }, "Run")), note));
      if (focused) document.getElementById(focused)?.focus();
      say();
    }
    loadSites().then(draw);
  }
  function read(params) {
    let edits = [];
    try { edits = JSON.parse(params.edits || "[]").map((each) => ({ tokens: "", feature: "0", scale: "1", shift: "1", ...each })); } catch { edits = []; }
    return { model: options.models.includes(params.model) ? params.model : options.models.find((name) => name.startsWith("smolvla")) || options.models[0],
      suite: params.suite in options.suites ? params.suite : Object.keys(options.suites)[0], task: params.task || "", seed: params.seed || "0", max_steps: params.max_steps || "120",
      prompt: params.prompt || "", image: params.image || "", strength: params.strength || "1", edits: Array.isArray(edits) ? edits.slice(0, options.max_edits).filter((each) => each && each.edit in KINDS) : [] };
  }
  const FIELDS = { patch: ["site", "tokens", "task"], ablate: ["site", "tokens"], steer: ["sae", "feature", "tokens", "scale", "shift"] };
  const own = (each) => Object.fromEntries(["edit", ...FIELDS[each.edit]].map((name) => [name, each[name]]));
  const write = (wanted) => ({ ...wanted, edits: wanted.edits.length ? JSON.stringify(wanted.edits.map(own)) : "", strength: wanted.image ? wanted.strength : "" });
  // what is no number goes as it was typed: the server says what it expected
  const numeric = (text) => (String(text).trim() !== "" && Number.isFinite(Number(text)) ? Number(text) : text);
  function body(wanted) {
    const graded = options.images.find((one) => one.kind === wanted.image)?.graded;
    return { model: wanted.model, suite: wanted.suite, task: wanted.task, seed: numeric(wanted.seed), max_steps: numeric(wanted.max_steps), prompt: wanted.prompt.trim() ? wanted.prompt : null,
      image: wanted.image ? { kind: wanted.image, strength: graded ? numeric(wanted.strength) : 1 } : null,
      edits: wanted.edits.map(own).map((each) => (each.edit === "steer" ? { ...each, feature: numeric(each.feature), scale: numeric(each.scale), shift: numeric(each.shift) } : each)) };
  }

  /* the stage: every row of the batch, as its events come */
  function stage(el, ended) {
    let rows = new Map(), begun = null, camera = "";
    const progress = h("progress", { max: 1, value: 0, "aria-label": "Steps done" }), says = h("p", { role: "status" }, "Loading the policy …");
    const stop = h("button", { type: "button", on: { click: () => { says.textContent = "Stopping …"; atlas.post("live/stop").catch(() => {}); } } }, "Stop");
    const screens = h("div", { class: "lv-screens" }), place = h("span", {});
    el.replaceChildren(h("div", { class: "lv-bar" }, stop, progress, place), says, screens);
    function start(about) {
      begun = about;
      camera = about.cameras[0];
      progress.max = about.max_steps;
      rows = new Map(about.rows.map(({ row, task }) => {
        const images = new Map();
        const picture = h("img", { alt: `What the policy sees, ${NAMES[row].toLowerCase()}`, class: "lv-picture" }), track = h("canvas", { class: "lv-track", width: 240, height: 240, role: "img", "aria-label": "Way of the hand from above" });
        const text = h("p", { class: "soft" }), told = h("p", {}), where = h("span", { class: "soft" });
        return [row, { images, picture, track, text, told, where, ways: [], el: h("section", { "aria-label": NAMES[row] }, h("h3", {}, h("span", { class: `ep-side side-${SIDES[row]}` }, NAMES[row]), row === "donor" ? ` task ${task}` : "", " ", where),
          h("div", { class: "lv-pair" }, picture, track), told, text) }];
      }));
      screens.replaceChildren(...[...rows.values()].map((row) => row.el));
      place.replaceChildren(about.cameras.length > 1 ? choose({ label: "Camera", value: camera, options: about.cameras, change: (value) => { camera = value; rows.forEach(show); } }) : "");
      says.replaceChildren(...(about.notes.length ? about.notes.map((note) => [badge("dead end", "note"), ` ${note} `]).flat() : ["Running."]));
    }
    function show(row) { if (row.images.get(camera)) row.picture.src = row.images.get(camera); }
    function take(event) {
      if (event.begun) start(event.begun);
      else if (event.ended) finish(event);
      else {
        const row = rows.get(event.row || event.over.row);
        for (const [name, url] of Object.entries(event.frames)) row.images.set(name, url);
        show(row);
        row.ways.push(event.state);
        drawTracks();
        if (event.over) {
          row.where.replaceChildren(badge(event.over.success ? "holds" : "does not hold", event.over.success ? "success" : "failure"), ` after ${event.over.n_steps} steps`);
          row.text.textContent = "";
        } else {
          progress.value = Math.max(progress.value, event.step + 1);
          row.where.textContent = `step ${event.step}`;
          row.told.replaceChildren("Told: ", h("q", {}, event.told));
          row.text.textContent = `${event.phase ? `${event.phase}; ` : ""}state ${event.state.map((value) => number(value)).join(", ")}`;
        }
      }
    }
    /* the hand's way from above, of every row in each picture */
    function drawTracks() {
      const ways = [...rows.values()].flatMap((row) => row.ways);
      if (!ways.length || ways[0].length < 2) return;
      const low = [0, 1].map((i) => Math.min(-0.25, ...ways.map((state) => state[i]))), high = [0, 1].map((i) => Math.max(0.25, ...ways.map((state) => state[i])));
      rows.forEach((row, name) => {
        const pen = row.track.getContext("2d"), size = row.track.width;
        pen.clearRect(0, 0, size, size);
        const at = (state) => [12 + ((state[0] - low[0]) / (high[0] - low[0])) * (size - 24), size - 12 - ((state[1] - low[1]) / (high[1] - low[1])) * (size - 24)];
        for (const [other, one] of rows) {
          if (other === "donor" && name !== "donor") continue;
          pen.strokeStyle = atlas.colour(SIDES[other] === "own" ? "own" : SIDES[other] === "other" ? "other" : "soft");
          pen.globalAlpha = other === name ? 1 : 0.35;
          pen.lineWidth = other === name ? 3 : 2;
          pen.setLineDash(other === "edited" ? [] : [5, 4]);
          pen.beginPath();
          one.ways.forEach((state, i) => pen[i ? "lineTo" : "moveTo"](...at(state)));
          pen.stroke();
        }
        const last = row.ways[row.ways.length - 1];
        if (last) { pen.globalAlpha = 1; pen.setLineDash([]); pen.fillStyle = atlas.colour("ink"); pen.beginPath(); pen.arc(...at(last), 5, 0, 7); pen.fill(); }
      });
    }
    function finish(event) {
      stop.disabled = true;
      progress.hidden = true;
      says.replaceChildren(event.ended === "failed" ? badge("damaged", "did not run") : "", event.ended === "failed" ? ` ${event.error}` : event.ended === "stopped" ? "Stopped." : verdict());
      ended();
    }
    function verdict() {
      const [a, b] = ["unedited", "edited"].map((name) => rows.get(name));
      const same = a.ways.length === b.ways.length && a.ways.every((state, i) => state.every((value, k) => value === b.ways[i][k]));
      const end = (row) => row.where.textContent;
      return `Done: unedited ${end(a)}, edited ${end(b)}.${same ? " The edit changed nothing: both took the same way." : ""}`;
    }
    return { take, lost() { if (!stop.disabled) { says.textContent = "The server stopped answering."; stop.disabled = true; ended(); } } };
  }

  atlas.view("live", {
    title: "Live",
    key: "l",
    async show(el, parts, params, fresh) {
      this.hide();
      alive = true;
      options = await atlas.get("live/options", { at: Date.now() });
      if (!fresh()) return;
      const asked = h("div"), played = h("div", { class: "lv-stage" });
      el.replaceChildren(h("h1", {}, "Live"), h("p", { class: "soft" }, `A policy of this machine on the tabletop: unedited and edited, from the same start and the same noise, one rollout at a time and for ${options.seconds} seconds at most. Changes act on the edited one alone.`), asked, played);
      // the form may be drawn later than the rollout begins
      const busy = (now_) => { running = now_; settle(); };
      const listen = () => {
        if (close) close();
        busy(true);
        // the server ends the stream after the last event
        let over = false;
        const shown = stage(played, () => { over = true; busy(false); });
        close = atlas.events("live/events", shown.take, () => { if (!over) shown.lost(); });
      };
      const begin = async (body_, note) => {
        note.textContent = "";
        try { await atlas.post("live/start", body_); } catch (error) { note.textContent = error.message; return; }
        if (alive) listen();
      };
      running = false;
      form(asked, params, begin);
      if (options.running) listen();
      else played.replaceChildren(empty("Nothing runs", "Choose a task and what to change, then Run."));
    },
    hide() {
      alive = false;
      // a rollout that nobody watches ends by itself
      if (close) close();
      close = null;
    },
  });
})();
