// The report of heat maps. Sections: data, state, panels, inspector, transport, tables, keyboard, start.
"use strict";

(() => {
  const { byId, make, makeSvg, number, unit, withUnit, DataTable, wordFilter } = Shared;
  const { Chunks, keyOf } = Overlay;
  const { once } = Shell;

  // Data ------------------------------------------------------------------------------------------------------

  const index = JSON.parse(byId("index").textContent);
  Overlay.useColours(index.colours);
  const units = Object.fromEntries(index.targets);
  const aboutMethod = Object.fromEntries(index.methods);
  const targetNames = index.targets.map(([name]) => name);
  const scenes = index.scenes;

  const frames = index.frames.map((row, number) => {
    const [id, stem, chunk, hasPicture, size, kept, speed, text, metrics, targets] = row;
    return { number, id, stem, chunk, hasPicture, size, kept, speed, text, metrics, targets };
  });
  scenes.forEach((scene, s) => {
    for (let i = 0; i < scene.count; i++) {
      const frame = frames[scene.first + i];
      frame.scene = s;
      frame.inChunk = i && frames[frame.number - 1].chunk === frame.chunk ? frames[frame.number - 1].inChunk + 1 : 0;
    }
  });

  const shownMethods = (() => {
    const used = new Set(scenes.flatMap((scene) => Object.keys(scene.scales).map((key) => key.split("\n")[1])));
    return index.methods.map(([name]) => name).filter((name) => used.has(name));
  })();

  const targetOf = (frame, name) => {
    const found = frame.targets.find((t) => t[0] === name);
    return found && { name, value: found[1], status: found[2], error: found[3] };
  };

  function pictureFile(frame) {
    const parts = [scenes[frame.scene].name, `${frame.stem}.jpg`].flatMap((part) => part.split("/"));
    return ["images", ...parts.map(encodeURIComponent)].join("/");
  }

  // State -----------------------------------------------------------------------------------------------------

  const state = {
    view: "frames",
    frame: 0,
    choices: [
      { target: targetNames[0] ?? "", method: shownMethods[0] ?? "" },
      { target: targetNames[0] ?? "", method: shownMethods[1] ?? shownMethods[0] ?? "" },
    ],
    compare: false,
    overlay: true,
    opacity: 80,
    waypoints: true,
    scale: "scene",
    playing: null,
  };

  const frameNow = () => frames[state.frame];
  const sceneNow = () => scenes[frameNow().scene];
  const VIEWS = ["frames", "metrics", "results", "failures", "about"];

  function hashOfState() {
    const frame = frameNow();
    const [a, b] = state.choices;
    const query = new URLSearchParams();
    if (frame) {
      query.set("scene", sceneNow().name);
      query.set("frame", frame.stem);
      query.set("target", a.target);
      query.set("method", a.method);
      if (state.compare) {
        query.set("target2", b.target);
        query.set("method2", b.method);
      }
      if (state.scale !== "scene") query.set("scale", state.scale);
    }
    if (state.view !== "frames") query.set("view", state.view);
    return `#${query}`;
  }

  // What a hash does not name, or names wrongly, stays as it is.
  function readHash() {
    const query = new URLSearchParams(location.hash.slice(1));
    const scene = scenes.find((s) => s.name === query.get("scene"));
    if (scene) {
      const inScene = frames.slice(scene.first, scene.first + scene.count);
      state.frame = (inScene.find((f) => f.stem === query.get("frame")) ?? inScene[0]).number;
    }
    ["", "2"].forEach((suffix, i) => {
      const [target, method] = [query.get(`target${suffix}`), query.get(`method${suffix}`)];
      if (targetNames.includes(target)) state.choices[i].target = target;
      if (shownMethods.includes(method)) state.choices[i].method = method;
    });
    if (query.size) state.compare = query.has("target2") || query.has("method2");
    if (["scene", "frame"].includes(query.get("scale"))) state.scale = query.get("scale");
    if (query.size) state.view = VIEWS.includes(query.get("view")) ? query.get("view") : "frames";
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

  // Panels ----------------------------------------------------------------------------------------------------

  class Panel {
    constructor(which) {
      this.which = which;
      this.root = byId("panel-template").content.firstElementChild.cloneNode(true);
      this.root.dataset.panel = "ab"[which];
      this.part = (name) => this.root.querySelector(`.${name}`);
      this.target = this.selector("target", targetNames, (name) => (units[name] ? `${name}  [${unit(units[name])}]` : name));
      this.method = this.selector("method", shownMethods, (name) => name);
      this.part("picture").addEventListener("pointermove", (event) => Overlay.probe(this.root, this.map, event));
      this.part("picture").addEventListener("pointerleave", () => (this.part("probe").textContent = ""));
      this.part("photo").addEventListener("error", () => this.root.classList.add("photo-missing"));
    }

    selector(name, values, label) {
      const select = this.part(name);
      select.append(...values.map((value) => make("option", { value, text: label(value) })));
      select.addEventListener("change", () => choose(this.which, { [name]: select.value }));
      return select;
    }

    // `details` are the frame's maps and points; undefined while they load.
    render(frame, details, problem) {
      const choice = state.choices[this.which];
      const target = targetOf(frame, choice.target);
      this.target.value = choice.target;
      this.method.value = choice.method;
      this.part("value").textContent = target && target.value !== null ? withUnit(target.value, units[choice.target]) : "";
      this.renderPicture(frame);
      this.renderPaths(frame, details);
      const map = details?.maps[keyOf(choice)];
      this.renderMap(map);
      this.notice(...this.whyNoMap(target, choice, map, details, problem));
      this.part("about-method").textContent = aboutMethod[choice.method] ?? "";
    }

    // What stands in place of a map: [text, kind], or nothing if there is one.
    whyNoMap(target, choice, map, details, problem) {
      if (target?.status === "failed") return [`failed: ${target.error ?? "no reason given"}`, "failed"];
      if (target?.status === "degenerate") {
        const value = withUnit(target.value, units[target.name]);
        return [`nothing to explain: ${target.name} = ${value} has no gradient`, "degenerate"];
      }
      if (problem) return [problem, "failed"];
      if (!details) return ["loading", "loading"];
      if (!target) return [`${choice.target} was not asked for in this frame`, "absent"];
      if (!map) return [`no map of ${choice.target} by ${choice.method}`, "absent"];
      if (map.peak === 0) return ["the map is zero everywhere", "absent"];
      return ["", ""];
    }

    notice(text, kind) {
      const notice = this.part("notice");
      notice.hidden = !text;
      notice.className = `notice ${kind}`;
      if (notice.textContent !== text) notice.textContent = text;
    }

    renderPicture(frame) {
      const [width, height] = frame.size ?? [2, 1];
      this.root.style.setProperty("--aspect", width / height);
      this.root.classList.toggle("photo-missing", !frame.hasPicture);
      const photo = this.part("photo");
      if (!frame.hasPicture) photo.removeAttribute("src");
      else if (photo.getAttribute("src") !== pictureFile(frame)) photo.src = pictureFile(frame);
      photo.alt = `${frame.id}: ${frame.text}`;
      const blind = this.part("blind");
      blind.hidden = !frame.hasPicture || frame.kept === null || frame.kept >= 1;
      blind.style.top = `${100 * (frame.kept ?? 1)}%`;
      this.part("heat").style.height = `${100 * (frame.kept ?? 1)}%`;
    }

    renderMap(map) {
      this.map = Overlay.show(this.root, map, {
        scale: map && this.scaleOf(map), visible: state.overlay, opacity: state.opacity, of: `this ${state.scale}`,
      });
    }

    scaleOf(map) {
      return state.scale === "frame" ? map.scale : sceneNow().scales[keyOf(state.choices[this.which])];
    }

    renderPaths(frame, details) {
      const svg = this.part("paths");
      svg.replaceChildren();
      if (!details || !frame.size || !state.waypoints) return;
      const [width, height] = frame.size;
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      const size = width / 450; // of marks: as in a picture of 450 pixels
      for (const name of ["route", "speed"]) {
        const pixels = details[`${name}_px`];
        const seen = pixels.map((point, i) => [point, details[name][i]]).filter(([p]) => p[0] !== null && p[1] !== null);
        const points = seen.map(([[u, v]]) => `${u},${v}`).join(" ");
        if (name === "route") {
          svg.append(makeSvg("polyline", { class: "path route halo", points }), makeSvg("polyline", { class: "path route", points }));
        }
        for (const [[u, v], [x]] of seen) {
          const r = size * Math.max(1.1, Math.min(3.4, 26 / (x + 5))); // smaller far away
          svg.append(mark(name, u, v, name === "speed" ? 1.5 * r : r));
        }
      }
    }
  }

  // A route point or a speed waypoint, in the picture and in the bird's-eye view alike.
  function mark(name, x, y, r) {
    if (name === "route") return makeSvg("circle", { class: "mark route", cx: x, cy: y, r });
    return makeSvg("path", { class: "mark speed", d: `M${x} ${y - r}L${x + r} ${y}L${x} ${y + r}L${x - r} ${y}Z` });
  }

  const panels = [new Panel(0), new Panel(1)];
  const shownChoices = () => (state.compare ? [0, 1] : [0]);

  function choose(which, values) {
    Object.assign(state.choices[which], values);
    render();
  }

  function cycle(list, key, step) {
    if (!list.length) return;
    const at = list.indexOf(state.choices[0][key]);
    choose(0, { [key]: list[(at + step + list.length) % list.length] });
  }

  // Inspector -------------------------------------------------------------------------------------------------

  function renderInspector(frame, details) {
    byId("frame-id").textContent = frame.id;
    byId("frame-speed").textContent = frame.speed === null ? "" : `${number(frame.speed, 3)}\u00a0m/s`;
    byId("commentary").textContent = frame.text || "no commentary";
    byId("commentary").classList.toggle("muted", !frame.text);
    byId("targets").replaceChildren(...frame.targets.map(([name, value, status, error]) => targetItem(name, value, status, error)));
    renderShares(details);
    renderBirdseye(frame, details);
  }

  function targetItem(name, value, status, error) {
    const chosen = shownChoices().some((i) => state.choices[i].target === name);
    const button = make(
      "button",
      { type: "button", "data-target": name, "data-status": status, "aria-pressed": String(chosen), title: error ?? name },
      make("span", { class: "name", text: name }),
      make("span", { class: `status ${status}`, text: status === "ok" ? "" : status }),
      make("span", { class: "number", text: value === null ? "" : withUnit(value, units[name]) }),
    );
    button.addEventListener("click", () => choose(0, { target: name }));
    return make("li", {}, button);
  }

  const PARTS = ["image", "text", "prompt", "queries"];

  function renderShares(details) {
    const bars = shownChoices().map((i) => {
      const shares = Object.entries(details?.maps[keyOf(state.choices[i])]?.shares ?? {}).filter(([, v]) => v !== null);
      return { name: `${state.choices[i].target}, ${state.choices[i].method}`, shares };
    }).filter(({ shares }) => shares.length);
    byId("shares-card").classList.toggle("empty", !bars.length);
    byId("shares").replaceChildren(...bars.flatMap(({ name, shares }) => {
      const total = shares.reduce((sum, [, v]) => sum + v, 0) || 1;
      const kind = (part) => `share ${PARTS.includes(part) ? part : ""}`;
      const label = shares.map(([part, v]) => `${part} ${Math.round(100 * v)} %`);
      return [
        state.compare ? make("p", { class: "muted", text: name }) : "",
        make("div", { class: "bar", role: "img", "aria-label": label.join(", ") },
          ...shares.map(([part, v]) => make("span", { class: kind(part), "data-part": part, style: `width:${(100 * v) / total}%`, title: `${part} ${number(100 * v, 3)} %` }))),
        make("div", { class: "legend" }, ...shares.map(([part], i) => make("span", { class: `key ${kind(part)}`, text: label[i] }))),
      ];
    }));
  }

  // Metres to a drawing of the ground: x forward up, y right, one scale for both, the same throughout a scene.
  function renderBirdseye(frame, details) {
    const host = byId("birdseye");
    const [nearest, farthest, side] = sceneNow().range;
    const drawing = Ground.ground(host, {
      back: Math.min(nearest, -1), front: Math.max(farthest * 1.05, 8), side: Math.max(side * 1.1, 2), unit: "m",
      label: "Route and speed waypoints from above, in metres",
    });
    if (!drawing) return;
    const { svg, at, middle, top } = drawing;
    for (const name of ["route", "speed"]) {
      const points = (details?.[name] ?? []).filter(([a, b]) => a !== null && b !== null);
      const line = points.map(([a, b]) => at(a, b).join()).join(" ");
      if (name === "route") svg.append(makeSvg("polyline", { class: "path route", points: line }));
      points.forEach(([a, b], i) => {
        const [u, v] = at(a, b);
        const dot = mark(name, u, v, name === "speed" ? 5 : 2.5);
        const when = name === "speed" ? `${0.25 * (i + 1)} s: ` : "";
        dot.append(makeSvg("title", {}, `${when}${number(a, 3)} m forward, ${number(b, 3)} m right`));
        svg.append(dot);
        if (name === "speed" && i % 4 === 3) {
          svg.append(makeSvg("text", { class: "time", x: u + 10, y: v + 4 }, `${(i + 1) / 4} s`));
        }
      });
    }
    if (details && !details.route.length && !details.speed.length) {
      svg.append(makeSvg("text", { x: middle, y: top + 20, "text-anchor": "middle" }, "no prediction"));
    }
    Ground.ego(drawing);
    host.replaceChildren(svg);
  }

  // Transport: slider, timeline, filmstrip, scenes --------------------------------------------------------------

  const PLAY_MS = 250;
  const THUMB_PIXELS = 64; // height, as in page.css

  function go(number) {
    const scene = sceneNow();
    change({ frame: Math.max(scene.first, Math.min(scene.first + scene.count - 1, number)) });
  }

  function goScene(s) {
    if (s >= 0 && s < scenes.length) change({ frame: scenes[s].first });
  }

  function play(on) {
    clearInterval(state.playing);
    state.playing = on ? setInterval(advance, PLAY_MS) : null;
    byId("play").setAttribute("aria-pressed", String(on));
    byId("play").setAttribute("aria-label", on ? "Pause" : "Play");
  }

  function advance() {
    if (!frameNow().shown) return; // its maps are still loading: wait rather than skip
    const scene = sceneNow();
    change({ frame: scene.first + ((state.frame - scene.first + 1) % scene.count) });
  }

  function renderTransport(frame) {
    const scene = sceneNow();
    const place = frame.number - scene.first;
    const slider = byId("frame-slider");
    slider.max = scene.count - 1;
    slider.value = place;
    slider.setAttribute("aria-valuetext", `${frame.stem}, ${place + 1} of ${scene.count}`);
    byId("position").textContent = `${place + 1} / ${scene.count}`;
    renderTimeline(scene, place);
    renderFilmstrip(scene, frame);
    for (const item of byId("scene-list").children) {
      const button = item.firstElementChild;
      const current = Number(button.dataset.number) === frame.scene;
      if (current && button.getAttribute("aria-current") !== "true") item.scrollIntoView({ block: "nearest" });
      button.setAttribute("aria-current", String(current));
    }
  }

  let timelineKey = "";
  function renderTimeline(scene, place) {
    const host = byId("timeline");
    const name = state.choices[0].target;
    const span = Math.max(1, scene.count - 1);
    if (timelineKey !== `${scene.first} ${name}`) {
      timelineKey = `${scene.first} ${name}`;
      const points = frames.slice(scene.first, scene.first + scene.count).map((frame) => targetOf(frame, name));
      const values = points.map((t) => t?.value ?? null);
      const finite = values.filter((v) => v !== null);
      const [low, high] = [Math.min(...finite), Math.max(...finite)];
      const at = (v) => (high > low ? 90 - (80 * (v - low)) / (high - low) : 50);
      const svg = makeSvg("svg", { viewBox: `0 0 ${span} 100`, preserveAspectRatio: "none", "aria-hidden": "true" });
      points.forEach((t, i) => {
        if (t && t.status !== "ok") svg.append(makeSvg("rect", { class: t.status, x: i - 0.5, y: 0, width: 1, height: 100 }));
      });
      let line = "";
      values.forEach((v, i) => (line += v === null ? "" : `${i && values[i - 1] !== null ? "L" : "M"}${i} ${at(v)}`));
      svg.append(makeSvg("path", { class: "line", d: line }), makeSvg("line", { class: "now", y1: 0, y2: 100 }));
      host.replaceChildren(svg);
      host.classList.toggle("single", scene.count === 1);
      const range = finite.length ? [number(high, 3), number(low, 3)] : [];
      byId("timeline-scale").replaceChildren(
        ...range.map((text) => make("span", { text })),
        make("span", { class: "muted", text: units[name] ? `${name} [${unit(units[name])}]` : name }),
      );
    }
    const now = host.querySelector(".now");
    now.setAttribute("x1", place);
    now.setAttribute("x2", place);
  }

  function renderFilmstrip(scene, frame) {
    const host = byId("filmstrip");
    const aspect = frame.size ? frame.size[0] / frame.size[1] : 2;
    const room = Math.max(1, Math.floor((host.clientWidth + 6) / (THUMB_PIXELS * aspect + 10)));
    const count = Math.min(room, scene.count);
    const place = frame.number - scene.first;
    const first = scene.first + Math.max(0, Math.min(scene.count - count, place - Math.floor(count / 2)));
    const old = new Map([...host.children].map((child) => [Number(child.dataset.number), child]));
    const thumbs = frames.slice(first, first + count).map((f) => old.get(f.number) ?? thumbnail(f));
    thumbs.forEach((thumb) => thumb.setAttribute("aria-current", String(Number(thumb.dataset.number) === frame.number)));
    host.style.setProperty("--aspect", aspect);
    host.replaceChildren(...thumbs);
  }

  function thumbnail(frame) {
    const status = frame.targets.length && frame.targets.every((t) => t[2] === "failed") ? "failed" : "";
    const button = make("button", { type: "button", class: status, "data-number": frame.number, title: frame.stem, "aria-label": frame.stem });
    if (frame.hasPicture) button.append(make("img", { src: pictureFile(frame), alt: "", loading: "lazy", decoding: "async" }));
    if (status) button.append(make("span", { text: status }));
    button.addEventListener("click", () => go(frame.number));
    return button;
  }

  function buildScenes() {
    const items = scenes.map((scene, s) => {
      const inScene = frames.slice(scene.first, scene.first + scene.count);
      const failed = inScene.filter((f) => f.targets.some((t) => t[2] === "failed")).length;
      const button = make("button", { type: "button", "data-scene": scene.name, "data-number": s },
        make("span", { class: "name", text: scene.name }),
        failed ? make("span", { class: "failed-count", text: failed, title: `${failed} of ${scene.count} frames failed` }) : "",
        make("span", { class: "muted", text: scene.count }));
      button.addEventListener("click", () => goScene(s));
      return make("li", {}, button);
    });
    byId("scene-list").replaceChildren(...items);
    const filter = byId("scene-filter");
    filter.hidden = scenes.length < 12;
    filter.addEventListener("input", () => {
      items.forEach((item, s) => (item.hidden = !scenes[s].name.toLowerCase().includes(filter.value.toLowerCase())));
    });
  }

  // Rendering -------------------------------------------------------------------------------------------------

  function render() {
    const frame = frameNow();
    renderView();
    writeHashSoon();
    if (!frame || state.view !== "frames") {
      play(false);
      return;
    }
    document.body.classList.toggle("comparing", state.compare);
    panels[1].root.hidden = !state.compare;
    byId("overlay").checked = state.overlay;
    byId("opacity").value = state.opacity;
    byId("opacity-value").textContent = `${state.opacity} %`;
    byId("waypoints").checked = state.waypoints;
    byId("scale").value = state.scale;
    byId("compare").checked = state.compare;
    renderTransport(frame);
    const kept = Chunks.kept.get(frame.chunk);
    if (kept) {
      Chunks.load(frame.chunk); // marks it as used
      renderDetails(frame, kept[frame.inChunk]);
    } else {
      renderDetails(frame);
      Chunks.load(frame.chunk).then(
        (chunk) => frameNow() === frame && renderDetails(frame, chunk[frame.inChunk]),
        (error) => frameNow() === frame && renderDetails(frame, undefined, error.message),
      );
    }
    const ahead = frames[frame.number + 16];
    if (kept && ahead && ahead.scene === frame.scene && ahead.chunk !== frame.chunk) Chunks.load(ahead.chunk).catch(() => {});
  }

  function renderDetails(frame, details, problem) {
    for (const panel of shownChoices().map((i) => panels[i])) panel.render(frame, details, problem);
    renderInspector(frame, details);
    frame.shown = Boolean(details || problem);
    byId("view-frames").dataset.frame = details || problem ? frame.id : "";
  }

  function renderView() {
    Shell.showView(VIEWS, state.view);
    if (state.view === "metrics") metricsTable();
    if (state.view === "failures") failuresTable();
    if (state.view === "results") resultTables();
  }

  // Tables ----------------------------------------------------------------------------------------------------

  // One row per frame and target.
  const rowsOfFrames = once(() => frames.flatMap((frame) => frame.targets.map((target) => ({ frame, target }))));

  const openFrame = (frame, target) => {
    if (target) state.choices[0].target = target;
    change({ view: "frames", frame: frame.number });
  };

  const metricsTable = once(() => {
    const all = rowsOfFrames();
    const columns = [
      { label: "scene" }, { label: "frame" }, { label: "target" }, { label: "status", kind: "status" },
      { label: "value", title: "the target's value" }, { label: "speed", unit: "m/s", title: "speed told to the model" },
      ...index.columns.map(([label, unit]) => ({ label, unit })), { label: "commentary", kind: "long" },
    ];
    const rows = all.map(({ frame, target }) => [
      scenes[frame.scene].name, frame.stem, target[0], target[2], target[1], frame.speed,
      ...index.columns.map((_, c) => frame.metrics[c] ?? null), frame.text,
    ]);
    const table = new DataTable(byId("metrics-table"), {
      label: "Metrics", columns, rows, onOpen: (r) => openFrame(all[r].frame, all[r].target[0]),
    });
    const [filter, status] = [byId("metrics-filter"), byId("metrics-status")];
    const apply = () => {
      const words = wordFilter(rows, filter.value);
      const left = table.filter((row, r) => (!status.value || row[3] === status.value) && words(row, r));
      byId("metrics-count").textContent = `${left.toLocaleString("en-US")} of ${rows.length.toLocaleString("en-US")} rows`;
    };
    filter.addEventListener("input", apply);
    status.addEventListener("change", apply);
    apply();
    return { apply };
  });

  const failures = once(() => {
    const found = [];
    for (const frame of frames) {
      const failed = frame.targets.filter((t) => t[2] === "failed");
      // A frame that failed before any target did is one line.
      const same = failed.length > 1 && failed.length === frame.targets.length && new Set(failed.map((t) => t[3])).size === 1;
      for (const t of same ? failed.slice(0, 1) : failed) {
        const error = t[3] ?? "no reason given";
        const named = /^(\w+): (.*)$/s.exec(error);
        found.push({ frame, target: same ? null : t[0], kind: named ? named[1] : "error", reason: named ? named[2] : error });
      }
    }
    return found;
  });

  const failuresTable = once(() => {
    const rows = failures().map((f) => [scenes[f.frame.scene].name, f.frame.stem, f.target ?? "all targets", f.kind, f.reason]);
    const kinds = new Map();
    for (const { kind } of failures()) kinds.set(kind, (kinds.get(kind) ?? 0) + 1);
    const chips = [...kinds].sort((a, b) => b[1] - a[1]).map(([kind, n]) => make("span", { class: "chip failed", text: `${n} \u00d7 ${kind}` }));
    byId("failures-kinds").replaceChildren(...(chips.length ? chips : [make("span", { class: "muted", text: "No frame failed." })]));
    if (!rows.length) return true;
    return new DataTable(byId("failures-table"), {
      label: "Failed frames",
      columns: ["scene", "frame", "target", "error", "reason"].map((label) => ({ label, kind: label === "reason" ? "long" : undefined })),
      rows,
      onOpen: (r) => openFrame(failures()[r].frame, failures()[r].target),
    });
  });

  const resultTables = once(() => Shell.buildResults(byId("view-results"), index));

  function buildCounts() {
    const counts = { ok: 0, degenerate: 0, failed: 0 };
    for (const { target } of rowsOfFrames()) counts[target[2]] = (counts[target[2]] ?? 0) + 1;
    const chips = Object.entries(counts).filter(([, n]) => n).map(([status, n]) => {
      const chip = make("button", { type: "button", class: `chip ${status}`, "data-status": status, text: `${n.toLocaleString("en-US")} ${status}`, title: "frames times targets; click to list them" });
      chip.addEventListener("click", () => {
        byId("metrics-status").value = status;
        change({ view: "metrics" });
        metricsTable().apply();
      });
      return chip;
    });
    byId("counts").replaceChildren(...chips);
  }

  function buildAbout() {
    byId("facts").replaceChildren(...Shell.definitions(index.facts));
    byId("methods").replaceChildren(...Shell.definitions(index.methods));
  }

  // Keyboard and pointer ----------------------------------------------------------------------------------------

  const KEYS = {
    ArrowLeft: () => go(state.frame - 1),
    ArrowRight: () => go(state.frame + 1),
    ArrowUp: () => goScene(frameNow().scene - 1),
    ArrowDown: () => goScene(frameNow().scene + 1),
    Home: () => go(0),
    End: () => go(frames.length),
    " ": () => play(!state.playing),
    m: () => cycle(shownMethods, "method", 1),
    M: () => cycle(shownMethods, "method", -1),
    t: () => cycle(targetNames, "target", 1),
    T: () => cycle(targetNames, "target", -1),
    o: () => change({ overlay: !state.overlay }),
    r: () => change({ waypoints: !state.waypoints }),
    n: () => change({ scale: state.scale === "scene" ? "frame" : "scene" }),
    s: () => change({ compare: !state.compare }),
    "+": () => change({ opacity: Math.min(100, state.opacity + 10) }),
    "=": () => change({ opacity: Math.min(100, state.opacity + 10) }),
    "-": () => change({ opacity: Math.max(0, state.opacity - 10) }),
  };

  function listen() {
    Shell.listenForKeys(KEYS, "view-frames", () => state.view === "frames" && frames.length);
    for (const tab of document.querySelectorAll("[data-view]")) tab.addEventListener("click", () => change({ view: tab.dataset.view }));
    for (const name of ["overlay", "waypoints", "compare"]) byId(name).addEventListener("change", (e) => change({ [name]: e.target.checked }));
    byId("scale").addEventListener("change", (e) => change({ scale: e.target.value }));
    byId("opacity").addEventListener("input", (e) => change({ opacity: Number(e.target.value) }));
    byId("frame-slider").addEventListener("input", (e) => go(sceneNow().first + Number(e.target.value)));
    byId("previous").addEventListener("click", () => go(state.frame - 1));
    byId("next").addEventListener("click", () => go(state.frame + 1));
    byId("play").addEventListener("click", () => play(!state.playing));
    byId("timeline").addEventListener("click", (e) => {
      const box = byId("timeline").getBoundingClientRect();
      go(sceneNow().first + Math.round(((e.clientX - box.left) / box.width) * (sceneNow().count - 1)));
    });
    window.addEventListener("hashchange", () => {
      if (location.hash === hashOfState()) return;
      readHash();
      render();
    });
    let resizing = 0;
    new ResizeObserver(() => {
      cancelAnimationFrame(resizing);
      resizing = requestAnimationFrame(render);
    }).observe(byId("view-frames"));
  }

  // Start -----------------------------------------------------------------------------------------------------

  byId("panels").append(...panels.map((panel) => panel.root));
  byId("tab-results").hidden = !index.tables.length && !index.figures.length;
  byId("tab-failures").hidden = !failures().length;
  byId("tab-failures").append(make("span", { class: "failed-count", text: failures().length }));
  if (!frames.length) {
    byId("view-frames").classList.add("empty");
    byId("view-frames").append(make("p", { class: "message", text: "This report holds no frames." }));
  }
  buildScenes();
  buildCounts();
  buildAbout();
  readHash();
  listen();
  render();
})();
