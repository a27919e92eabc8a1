// What stands around the content of every report page: tabs, keys, help, and the tables and figures of the results.
"use strict";

const Shell = (() => {
  const { byId, make, DataTable } = Shared;

  const once = (build) => {
    let built;
    return () => (built ??= build());
  };

  // Shows one of the views, each of which has the elements view-<name> and tab-<name>.
  function showView(views, chosen) {
    for (const name of views) {
      byId(`view-${name}`).hidden = name !== chosen;
      byId(`tab-${name}`).setAttribute("aria-selected", String(name === chosen));
    }
  }

  const definitions = (pairs) => pairs.flatMap(([name, text]) => [make("dt", { text: name }), make("dd", { text })]);

  function buildResults(section, { tables, figures }) {
    tables.forEach(({ title, note, columns, rows }, i) => {
      const host = make("div", { class: "table-host", id: `result-${i}` });
      section.append(make("h2", { text: title }), note ? make("p", { class: "note", text: note }) : "", host);
      new DataTable(host, { label: title, columns: columns.map((label) => ({ label })), rows });
    });
    for (const { title, note, file } of figures) {
      const image = make("img", { src: file, alt: title, loading: "lazy" });
      section.append(make("h2", { text: title }), note ? make("p", { class: "note", text: note }) : "", make("figure", {}, image));
    }
    return true;
  }

  function toggleHelp() {
    const help = byId("help");
    if (help.open) help.close();
    else help.showModal();
  }

  // keys: by name, what they do while active() holds and nothing is typed; `view`: whose buttons give the keys back.
  function listenForKeys(keys, view, active) {
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      const target = event.target;
      if (target.matches("input[type=search], input[type=number], select, textarea")) {
        if (event.key === "Escape") target.blur();
        return;
      }
      if (event.key === "?") {
        toggleHelp();
        return;
      }
      const native = (target.matches("button") && event.key === " ") || (target.id === "opacity" && event.key.startsWith("Arrow"));
      if (byId("help").open || native || !keys[event.key] || !active()) return;
      event.preventDefault();
      keys[event.key]();
    });
    byId("help-open").addEventListener("click", toggleHelp);
    // A control that was clicked gives the keys back to the page; one that was reached by Tab keeps them.
    let byKeys = false;
    document.addEventListener("mousedown", () => (byKeys = false), true);
    document.addEventListener("keydown", () => (byKeys = true), true);
    document.addEventListener("change", (e) => byKeys || e.target.matches("input[type=search]") || e.target.blur());
    document.addEventListener("click", (e) => e.detail && e.target.closest(`#${view} button`)?.blur());
  }

  return { once, showView, definitions, buildResults, listenForKeys };
})();
