// The report of a policy. Sections: data, state, picture, view from above, numbers, table and filters, start.
"use strict";

(() => {
  const { byId, make, makeSvg, number, unit, withUnit, DataTable, wordFilter } = Shared;
  const { Chunks, keyOf } = Overlay;
  const { once } = Shell;

  // Data ------------------------------------------------------------------------------------------------------

  const index = JSON.parse(byId("index").textContent);
  Overlay.useColours(index.colours);
  const columns = index.columns.map(([name, label, unit, about, isError]) => ({ name, label, unit, about, isError }));
  const errors = columns.filter((column) => column.isError);
  const aboutMethod = Object.fromEntries(index.methods);
  const methodNames = (() => {
    const used = new Set(Object.keys(index.scales).map((key) => key.split("\n")[1]));
    return index.methods.map(([name]) => name).filter((name) => used.has(name));
  })();
  const hasMaps = index.targets.length > 0;

  const samples = index.samples.map((row, place) => {
    const [id, number, chunk, size, noPicture, instruction, kind, dataset, recording, status, error, metrics] = row;
    return { place, id, number, chunk, size, noPicture, instruction, kind, dataset, recording, status, error, metrics };
  });
  samples.forEach((sample, i) => {
    sample.inChunk = i && samples[i - 1].chunk === sample.chunk ? samples[i - 1].inChunk + 1 : 0;
  });

  const pictureFile = (sample) => `images/${String(sample.place).padStart(6, "0")}.jpg`;

  // Positions of deltas, the start first, as far as they are known.
  function positions(deltas) {
    const points = [[0, 0]];
    for (const [dx, dy] of deltas ?? []) {
      if (dx === null || dy === null) break;
      const [x, y] = points[points.length - 1];
      points.push([x + dx, y + dy]);
    }
    return points;
  }

  // State -----------------------------------------------------------------------------------------------------

  const VIEWS = ["samples", "results", "about"];
  const FILTERS = { words: "words", kind: "kind-filter", dataset: "dataset-filter", status: "status-filter", by: "range-by", min: "range-min", max: "range-max" };

  const state = {
    view: "samples",
    sample: 0,
    target: index.targets[0] ?? "",
    method: methodNames[0] ?? "",
    overlay: true,
    opacity: 80,
    scale: "sample",
    fit: false,
    fan: true,
  };
  const sampleNow = () => samples[state.sample];

  function hashOfState() {
    const query = new URLSearchParams();
    if (sampleNow()) query.set("sample", sampleNow().id);
    if (hasMaps) {
      query.set("target", state.target);
      query.set("method", state.method);
    }
    for (const [name, id] of Object.entries(FILTERS)) {
      const value = byId(id).value;
      if (value && (name !== "by" || byId("range-min").value || byId("range-max").value)) query.set(name, value);
    }
    if (state.view !== "samples") query.set("view", state.view);
    return `#${query}`;
  }

  // What a hash does not name, or names wrongly, stays as it is; filters that it does not name are cleared.
  function readHash() {
    const query = new URLSearchParams(location.hash.slice(1));
    if (!query.size) return;
    const found = samples.find((s) => s.id === query.get("sample"));
    if (found) state.sample = found.place;
    if (index.targets.includes(query.get("target"))) state.target = query.get("target");
    if (methodNames.includes(query.get("method"))) state.method = query.get("method");
    for (const [name, id] of Object.entries(FILTERS)) {
      const field = byId(id);
      const value = query.get(name) ?? (name === "by" ? errors[0]?.name : "") ?? "";
      if (field.tagName !== "SELECT" || [...field.options].some((o) => o.value === value)) field.value = value;
    }
    state.view = VIEWS.includes(query.get("view")) ? query.get("view") : "samples";
  }

  let hashTimer = 0;
  function writeHashSoon() {
    clearTimeout(hashTimer); // browsers limit how often an address may change
    hashTimer = setTimeout(() => {
      if (location.hash !== hashOfState()) history.replaceState(null, "", hashOfState());
    }, 150);
  }

  function change(values) {
    Object.assign(state, values);
    render();
  }

  function cycle(list, name, step) {
    if (list.length) change({ [name]: list[(list.indexOf(state[name]) + step + list.length) % list.length] });
  }

  // Picture ---------------------------------------------------------------------------------------------------

  const panel = byId("panel");
  let shownMap = null;

  // `details` are the sample's trajectories and maps; undefined while they load.
  function renderPicture(sample, details, problem) {
    const [width, height] = sample.size ?? [4, 3];
    document.documentElement.style.setProperty("--aspect", width / height);
    panel.classList.toggle("photo-missing", sample.noPicture !== null);
    const photo = byId("photo");
    if (sample.noPicture !== null) photo.removeAttribute("src");
    else if (photo.getAttribute("src") !== pictureFile(sample)) photo.src = pictureFile(sample);
    photo.alt = `${sample.id}: ${sample.instruction}`;
    sayNoPicture(sample.noPicture);
    const kept = details?.kept ?? 1;
    const blind = panel.querySelector(".blind");
    blind.hidden = sample.noPicture !== null || kept >= 1;
    blind.style.top = `${100 * kept}%`;
    panel.querySelector(".heat").style.height = `${100 * kept}%`;
    const map = details?.maps[keyOf(state)];
    const scale = map && (state.scale === "all" ? index.scales[keyOf(state)] : map.scale);
    const of = state.scale === "all" ? "all samples" : "this sample";
    shownMap = Overlay.show(panel, map, { scale, visible: state.overlay, opacity: state.opacity, of });
    notice(...whyNoMap(sample, details, map, problem));
  }

  function sayNoPicture(reason) {
    byId("no-photo").replaceChildren(...(reason === null ? [] : [make("b", { text: "no picture" }), make("span", { text: reason })]));
  }

  // What stands over the picture: [text, kind], or nothing.
  function whyNoMap(sample, details, map, problem) {
    if (sample.status !== "ok") return [`${sample.status}: ${sample.error ?? "no reason given"}`, sample.status === "failed" ? "failed" : "degenerate"];
    if (problem) return [problem, "failed"];
    if (!details) return ["loading", "loading"];
    if (!hasMaps || !state.overlay) return ["", ""];
    if (!map) return [`no map of ${state.target} by ${state.method}`, "absent"];
    return map.peak === 0 ? ["the map is zero everywhere", "absent"] : ["", ""];
  }

  function notice(text, kind) {
    const element = byId("notice");
    element.hidden = !text;
    element.className = `notice ${kind}`;
    element.textContent = text;
  }

  // View from above ---------------------------------------------------------------------------------------------

  // Left is violet and right is red, more of it for a turn than for an adjustment; other instructions in turn.
  const COMMANDS = {
    "turn left": "#8f86ff", "adjust left": "#c3bcff", "go forward": "#9be564",
    stop: "#ff8ad0", "adjust right": "#ffc28a", "turn right": "#ff6f52",
  };
  const OTHERS = ["#56e0b0", "#e6df6b", "#d59bff", "#7fb2ff"];

  // What is drawn, from below to above: { name, kind, colour, deltas }.
  function lines(details) {
    const found = [];
    const add = (kind, name, deltas, colour) => deltas && positions(deltas).length > 1 && found.push({ kind, name, deltas, colour });
    const steps = (details.predicted ?? details.target ?? details.variants[0]?.[1] ?? []).length;
    add("straight", "straight ahead", index.straight ? Array(steps).fill([index.straight, 0]) : null, "var(--straight)");
    add("target", "target", details.target, "var(--target)");
    let other = 0;
    for (const [text, deltas] of state.fan ? details.variants : []) {
      add("variant", text, deltas, COMMANDS[text] ?? OTHERS[other++ % OTHERS.length]);
    }
    add("predicted", "predicted", details.predicted, "var(--predicted)");
    return found;
  }

  // How far it is seen: as far as most samples reach and this one does, or this one alone.
  function extent(drawn) {
    const all = drawn.flatMap(({ deltas }) => positions(deltas));
    const own = [Math.max(...all.map(([x]) => -x), 0), Math.max(...all.map(([x]) => x), 0), Math.max(...all.map(([, y]) => Math.abs(y)), 0)];
    const [back, front, side] = own.map((reach, i) => (state.fit ? reach : Math.max(reach, index.range[i])));
    const least = state.fit ? 0.05 * (front + back) + 0.1 : 0.6;
    return { back: -(back * 1.05 + least), front: Math.max(front * 1.06, state.fit ? 0.3 : 1), side: Math.max(side * 1.12, state.fit ? 0.3 : 1) };
  }

  function renderGround(sample, details) {
    const host = byId("birdseye");
    const drawn = details ? lines(details) : [];
    host.classList.remove("highlighting");
    byId("fan-switch").hidden = !details?.variants.length;
    const label = "Trajectories from above, in units of waypoint spacings: forward is up, left is left";
    const drawing = Ground.ground(host, { ...extent(drawn), unit: "units", leftward: true, finest: 0.1, label });
    if (!drawing) return;
    const ends = drawn.map((line) => drawLine(drawing, line));
    Ground.ego(drawing);
    if (details && !details.predicted) {
      const text = sample.status === "ok" ? "no prediction" : `no prediction: ${sample.status}`;
      drawing.svg.append(makeSvg("text", { class: "reason", x: drawing.middle, y: drawing.top + 22, "text-anchor": "middle" }, text));
    }
    host.replaceChildren(drawing.svg);
    labelEnds(drawing, drawn, ends);
    renderLegend(host, drawn);
  }

  // Returns where it ends, in pixels.
  function drawLine({ svg, at }, { kind, name, deltas, colour }) {
    const group = makeSvg("g", { class: `trajectory ${kind}`, style: `--colour:${colour}`, "data-name": name });
    const points = positions(deltas);
    const pixels = points.map(([x, y]) => at(x, y));
    group.append(makeSvg("polyline", { class: `line ${kind}`, points: pixels.map((p) => p.join()).join(" ") }));
    pixels.forEach(([cx, cy], i) => {
      const last = i === pixels.length - 1;
      if (!i || kind === "straight" || (kind === "variant" && !last)) return;
      const dot = makeSvg("circle", { class: "dot", cx, cy, r: last ? 5 : kind === "target" ? 4 : 3 });
      dot.append(makeSvg("title", {}, `${name}, step ${i}: ${number(points[i][0], 3)} forward, ${number(points[i][1], 3)} left`));
      group.append(dot);
    });
    svg.append(group);
    return pixels[pixels.length - 1];
  }

  const LABEL_PIXELS = 14;
  const LABEL_LETTERS = 22;

  // Other instructions are named where they end, those on the left to the left, pushed apart where they would overlap.
  function labelEnds({ svg, middle, left: edge }, drawn, ends) {
    for (const left of [true, false]) {
      const mine = drawn.map((line, i) => ({ ...line, end: ends[i] })).filter(({ kind, end }) => kind === "variant" && end[0] < middle === left);
      let lowest = -Infinity;
      for (const { name, colour, end } of mine.sort((a, b) => a.end[1] - b.end[1])) {
        const short = name.length > LABEL_LETTERS ? `${name.slice(0, LABEL_LETTERS - 1)}\u2026` : name;
        const text = makeSvg("text", { x: end[0] + (left ? -9 : 9), "text-anchor": left ? "end" : "start" }, short);
        const group = makeSvg("g", { class: "trajectory variant label", style: `--colour:${colour}`, "data-name": name });
        group.append(text);
        svg.insertBefore(group, svg.querySelector(".trajectory.predicted")); // which nothing hides
        const { x, width } = text.getBBox();
        const over = left ? Math.min(0, x - edge) : Math.max(0, x + width - svg.clientWidth); // out of the drawing
        lowest = Math.max(end[1] + (over ? -7 : 4), lowest + LABEL_PIXELS); // beside the end, or above it
        text.setAttribute("x", end[0] + (left ? -9 : 9) - over);
        text.setAttribute("y", lowest);
      }
    }
  }

  function renderLegend(host, drawn) {
    byId("lines").replaceChildren(...drawn.toReversed().map(({ kind, name, colour }) => {
      const sign = makeSvg("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" });
      sign.append(makeSvg("line", { class: `line ${kind}`, style: `--colour:${colour}`, x1: 2, x2: 20, y1: 4, y2: 4 }));
      if (kind !== "variant") return make("span", { class: "line-key" }, sign, name);
      const key = make("button", { type: "button", class: "line-key", title: "Show this one alone" }, sign, `\u201c${name}\u201d`);
      const mark = (on) => {
        host.classList.toggle("highlighting", on);
        for (const g of host.querySelectorAll(".variant")) g.classList.toggle("strong", on && g.dataset.name === name);
      };
      for (const [event, on] of [["pointerenter", true], ["focus", true], ["pointerleave", false], ["blur", false]]) key.addEventListener(event, () => mark(on));
      return key;
    }));
  }

  // Numbers -----------------------------------------------------------------------------------------------------

  function renderNumbers(sample, details) {
    const groups = new Map(); // columns of one name in several units stand together
    columns.forEach((column, c) => {
      if (sample.metrics[c] !== null) groups.set(column.label, [...(groups.get(column.label) ?? []), { ...column, value: sample.metrics[c] }]);
    });
    byId("metrics").replaceChildren(...[...groups].map(([label, members]) =>
      make("div", { title: members[0].about }, make("dt", { text: label }), ...members.map(metric))));
    renderSteps(details);
    const origin = { sample: sample.id, recording: sample.recording, dataset: sample.dataset };
    if (details && details.scale_m !== null) origin.scale = `1 unit = ${withUnit(details.scale_m, "m")}`;
    byId("origin").replaceChildren(...Shell.definitions(Object.entries(origin).filter(([, text]) => text)));
  }

  function metric({ name, value, unit: of }) {
    if (typeof value === "string") return make("dd", { "data-metric": name }, make("span", { class: `status ${value}`, text: value }));
    return make("dd", { "data-metric": name }, number(value, 3), of ? make("small", { text: `\u00a0${unit(of)}` }) : "");
  }

  const HEADINGS = { predicted: ["x", "y"], target: ["x", "y"], probability: ["p(x)", "p(y)"] };

  function renderSteps(details) {
    const parts = Object.keys(HEADINGS).filter((name) => details?.[name]);
    const both = details?.predicted && details?.target;
    byId("steps").hidden = byId("steps-note").hidden = !parts.length;
    if (!parts.length) return;
    const [mine, right] = [positions(details.predicted), positions(details.target)];
    const cell = (text, kind) => make("td", { class: kind, text });
    const rows = details[parts[0]].map((_, k) => make("tr", {},
      cell(k + 1), ...parts.flatMap((name) => (details[name][k] ?? [null, null]).map((v) => cell(fixed(v), name))),
      both ? cell(mine[k + 1] && right[k + 1] ? fixed(Math.hypot(mine[k + 1][0] - right[k + 1][0], mine[k + 1][1] - right[k + 1][1])) : fixed(null), "distance") : ""));
    byId("steps").replaceChildren(
      make("thead", {},
        make("tr", {}, make("th"), ...parts.map((name) => make("th", { colspan: 2, class: name, text: name })), both ? make("th", { text: "distance" }) : ""),
        make("tr", {}, make("th", { text: "step" }), ...parts.flatMap((name) => HEADINGS[name].map((text) => make("th", { text }))), both ? make("th", { text: "units" }) : "")),
      make("tbody", {}, ...rows),
    );
    byId("steps-note").textContent = `Deltas in units, x forward, y left.${both ? " Distance: between positions, all steps before included." : ""}`;
  }

  const fixed = (value) => (value === null ? "\u2013" : value.toFixed(2).replace("-", "\u2212"));

  // Rendering -----------------------------------------------------------------------------------------------------

  function render() {
    Shell.showView(VIEWS, state.view);
    writeHashSoon();
    if (state.view === "results") resultTables();
    const sample = sampleNow();
    if (!sample || state.view !== "samples") return;
    for (const name of ["overlay", "fit", "fan"]) byId(name).checked = state[name];
    for (const name of ["target", "method", "opacity", "scale"]) byId(name).value = state[name];
    byId("method").title = aboutMethod[state.method] ?? "";
    byId("instruction").textContent = sample.instruction || "no instruction";
    byId("instruction").classList.toggle("muted", !sample.instruction);
    byId("kind").textContent = sample.kind;
    byId("status").textContent = sample.status;
    byId("status").className = `status ${sample.status}`;
    renderPosition();
    if (table.current !== sample.place) table.select(sample.place);
    const kept = Chunks.kept.get(sample.chunk);
    if (kept) {
      Chunks.load(sample.chunk); // marks it as used
      renderDetails(sample, kept[sample.inChunk]);
    } else {
      renderDetails(sample);
      Chunks.load(sample.chunk).then(
        (chunk) => sampleNow() === sample && renderDetails(sample, chunk[sample.inChunk]),
        (error) => sampleNow() === sample && renderDetails(sample, undefined, error.message),
      );
    }
  }

  function renderDetails(sample, details, problem) {
    renderPicture(sample, details, problem);
    renderGround(sample, details);
    renderNumbers(sample, details);
    byId("view-samples").dataset.sample = details || problem ? sample.id : "";
  }

  function renderPosition() {
    const at = table.order.indexOf(state.sample);
    byId("position").textContent = `${at < 0 ? "\u2013" : (at + 1).toLocaleString("en-US")} / ${table.order.length.toLocaleString("en-US")}`;
    byId("previous").disabled = at <= 0;
    byId("next").disabled = at === table.order.length - 1 || !table.order.length;
  }

  // To the row `to(place)` of the table as it is sorted and filtered; its ends stay its ends.
  function go(to) {
    if (!table.order.length) return;
    const at = Math.max(0, Math.min(table.order.length - 1, to(table.order.indexOf(state.sample))));
    change({ sample: table.order[at] });
  }

  const resultTables = once(() => Shell.buildResults(byId("view-results"), index));

  // Table and filters ---------------------------------------------------------------------------------------------

  const several = (name) => new Set(samples.map((s) => s[name])).size > 1;

  const table = (() => {
    const shown = [
      { label: "#", of: (s) => s.number, title: "place in the run" },
      { label: "instruction", of: (s) => s.instruction },
      { label: "kind", of: (s) => s.kind },
      ...columns.map(({ name, label, unit, about }, c) => ({ label, unit, name, title: about, of: (s) => s.metrics[c], kind: name === "turn_side" ? "status" : undefined })),
      { label: "status", of: (s) => s.status, kind: "status" },
      ...(several("dataset") ? [{ label: "dataset", of: (s) => s.dataset }] : []),
      ...(several("recording") ? [{ label: "recording", of: (s) => s.recording }] : []),
      { label: "sample", of: (s) => s.id },
      ...(samples.some((s) => s.error) ? [{ label: "error", of: (s) => s.error, kind: "long" }] : []),
    ];
    const rows = samples.map((sample) => shown.map((column) => column.of(sample) ?? null));
    return new DataTable(byId("table"), {
      label: "Samples", columns: shown, rows,
      onOpen: (r) => change({ sample: r }),
    });
  })();
  table.onOrder = renderPosition;

  function options(select, values, all) {
    const counts = new Map();
    for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
    const named = [...counts].sort((a, b) => b[1] - a[1]);
    select.replaceChildren(make("option", { value: "", text: all }), ...named.map(([value, n]) => make("option", { value, text: `${value} (${n.toLocaleString("en-US")})` })));
    return named;
  }

  const texts = table.rows.map((row) => row.filter((cell) => typeof cell === "string")); // words are not sought in numbers

  function applyFilters() {
    const value = (name) => byId(FILTERS[name]).value;
    const by = columns.findIndex((column) => column.name === value("by"));
    const [least, most] = ["min", "max"].map((name) => (value(name) === "" ? null : Number(value(name))));
    const words = wordFilter(texts, value("words"));
    const left = table.filter((row, r) => {
      const sample = samples[r];
      if (["kind", "dataset", "status"].some((name) => value(name) && sample[name] !== value(name))) return false;
      if (by >= 0 && (least !== null || most !== null)) {
        const error = sample.metrics[by];
        if (error === null || (least !== null && error < least) || (most !== null && error > most)) return false;
      }
      return words(row, r);
    });
    byId("count").textContent = left ? `${left.toLocaleString("en-US")} of ${samples.length.toLocaleString("en-US")} samples` : "no sample matches";
    byId("clear").hidden = left === samples.length;
    if (left && !table.order.includes(state.sample)) state.sample = table.order[0];
    else if (left) table.select(state.sample);
  }

  function clearFilters() {
    for (const [name, id] of Object.entries(FILTERS)) if (name !== "by") byId(id).value = "";
    applyFilters();
    render();
  }

  function showRange() {
    const c = columns.findIndex((column) => column.name === byId("range-by").value);
    if (c < 0) return;
    const known = samples.map((s) => s.metrics[c]).filter((v) => v !== null);
    const [least, most] = known.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    byId("range-min").placeholder = number(least, 2);
    byId("range-max").placeholder = number(most, 2);
  }

  function buildFilters() {
    options(byId("kind-filter"), samples.map((s) => s.kind), "all");
    options(byId("dataset-filter"), samples.map((s) => s.dataset), "all");
    byId("dataset-field").hidden = !several("dataset");
    const statuses = options(byId("status-filter"), samples.map((s) => s.status), "all");
    byId("counts").replaceChildren(...statuses.map(([status, n]) => {
      const chip = make("button", { type: "button", class: `chip ${status}`, "data-status": status, text: `${n.toLocaleString("en-US")} ${status}`, title: "Click to list them" });
      chip.addEventListener("click", () => {
        byId("status-filter").value = status;
        applyFilters();
        change({ view: "samples" });
      });
      return chip;
    }));
    byId("range-by").append(...errors.map(({ name, label, unit }) => make("option", { value: name, text: `${label}, ${unit}` })));
    byId("range-field").hidden = !errors.length;
    showRange();
    for (const id of Object.values(FILTERS)) {
      byId(id).addEventListener(byId(id).tagName === "SELECT" ? "change" : "input", () => {
        applyFilters();
        render();
      });
    }
    byId("range-by").addEventListener("change", showRange);
    byId("clear").addEventListener("click", clearFilters);
  }

  // Start -----------------------------------------------------------------------------------------------------

  const KEYS = {
    ArrowLeft: () => go((at) => at - 1),
    ArrowRight: () => go((at) => at + 1),
    Home: () => go(() => 0),
    End: () => go(() => table.order.length - 1),
    o: () => change({ overlay: !state.overlay }),
    t: () => cycle(index.targets, "target", 1),
    T: () => cycle(index.targets, "target", -1),
    m: () => cycle(methodNames, "method", 1),
    M: () => cycle(methodNames, "method", -1),
    n: () => change({ scale: state.scale === "sample" ? "all" : "sample" }),
    "+": () => change({ opacity: Math.min(100, state.opacity + 10) }),
    "=": () => change({ opacity: Math.min(100, state.opacity + 10) }),
    "-": () => change({ opacity: Math.max(0, state.opacity - 10) }),
    f: () => change({ fit: !state.fit }),
    v: () => change({ fan: !state.fan }),
    "/": () => byId("words").focus(),
  };

  function listen() {
    Shell.listenForKeys(KEYS, "sample", () => state.view === "samples" && samples.length);
    for (const tab of document.querySelectorAll("[data-view]")) tab.addEventListener("click", () => change({ view: tab.dataset.view }));
    for (const name of ["overlay", "fit", "fan"]) byId(name).addEventListener("change", (e) => change({ [name]: e.target.checked }));
    for (const name of ["target", "method", "scale"]) byId(name).addEventListener("change", (e) => change({ [name]: e.target.value }));
    byId("opacity").addEventListener("input", (e) => change({ opacity: Number(e.target.value) }));
    byId("previous").addEventListener("click", () => go((at) => at - 1));
    byId("next").addEventListener("click", () => go((at) => at + 1));
    byId("picture").addEventListener("pointermove", (event) => Overlay.probe(panel, shownMap, event));
    byId("picture").addEventListener("pointerleave", () => (panel.querySelector(".probe").textContent = ""));
    byId("photo").addEventListener("error", () => {
      panel.classList.add("photo-missing");
      sayNoPicture(`${byId("photo").getAttribute("src")} cannot be read`);
    });
    window.addEventListener("hashchange", () => {
      if (location.hash === hashOfState()) return;
      readHash();
      applyFilters();
      render();
    });
    let resizing = 0;
    new ResizeObserver(() => {
      cancelAnimationFrame(resizing);
      resizing = requestAnimationFrame(render);
    }).observe(byId("birdseye"));
  }

  function buildAbout() {
    byId("units").textContent = index.units;
    byId("brief").textContent = index.facts.map(([name, text]) => `${name}: ${text}`).join("  \u00b7  ");
    byId("facts").replaceChildren(...Shell.definitions(index.facts));
    byId("methods").replaceChildren(...Shell.definitions(index.methods));
    byId("about-methods").hidden = !index.methods.length;
    byId("tab-results").hidden = !index.tables.length && !index.figures.length;
    for (const element of document.querySelectorAll(".of-maps")) element.hidden = !hasMaps;
    byId("target").append(...index.targets.map((value) => make("option", { value, text: value })));
    byId("method").append(...methodNames.map((value) => make("option", { value, text: value })));
  }

  if (!samples.length) {
    byId("view-samples").classList.add("empty");
    byId("view-samples").append(make("p", { class: "message", text: "This report holds no samples." }));
  }
  buildAbout();
  buildFilters();
  readHash();
  applyFilters();
  listen();
  render();
})();
