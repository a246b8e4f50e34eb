(() => {
  "use strict";
  const root = document.documentElement;
  const all = (query, from = document) => [...from.querySelectorAll(query)];

  // Theme: the system's until the button is used; remembered where the browser lets a local page remember.
  const store = { get() { try { return localStorage.getItem("es_trl-theme"); } catch { return null; } },
                  set(value) { try { localStorage.setItem("es_trl-theme", value); } catch { /* a private window */ } } };
  if (["light", "dark"].includes(store.get())) root.dataset.theme = store.get();
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    store.set(root.dataset.theme);
  });

  // Everything below belongs to the main part, which a live page puts in anew.
  const start = () => {
  all("[hidden]").forEach((node) => { node.hidden = false; });

  // Before and after: the range input does keyboard and assistive technology, the pointer sets it directly, so that a
  // tap anywhere counts and a vertical swipe still scrolls.
  const stages = all(".stage");
  const tagOf = (stage, side) => stage.querySelector(`.on-${side}`).textContent;
  const show = (stage) => {
    const input = stage.querySelector("input");
    stage.style.setProperty("--at", `${input.value}%`);
    input.setAttribute("aria-valuetext", `${input.value} % ${tagOf(stage, "left")}, ${100 - input.value} % ${tagOf(stage, "right")}`);
  };
  stages.forEach((stage) => {
    const input = stage.querySelector("input");
    const follow = (event) => {
      const box = stage.getBoundingClientRect();
      input.value = Math.round(100 * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)));
      show(stage);
    };
    input.addEventListener("input", () => show(stage));
    stage.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      event.preventDefault();
      input.focus({ preventScroll: true, focusVisible: false });
      stage.setPointerCapture(event.pointerId);
      follow(event);
    });
    stage.addEventListener("pointermove", (event) => { if (stage.hasPointerCapture(event.pointerId)) follow(event); });
    show(stage);
  });
  const every = document.getElementById("all");
  if (every) every.addEventListener("input", () => stages.forEach((stage) => {
    stage.querySelector("input").value = every.value;
    show(stage);
  }));

  const choose = (side, select) => all(".pairs .stage").forEach((stage) => {
    stage.dataset[side] = select.value;
    all("img", stage).forEach((image) => {
      const row = image.dataset.row;
      image.className = row === stage.dataset.left ? "left" : row === stage.dataset.right ? "right" : "off";
    });
    // One model on both sides is one picture: shown whole.
    if (stage.dataset.left === stage.dataset.right) all("img.left", stage).forEach((image) => { image.className = "right"; });
    stage.querySelector(`.on-${side}`).textContent = select.selectedOptions[0].textContent;
    show(stage);
  });
  for (const side of ["left", "right"]) {
    const select = document.getElementById(side);
    if (select) { select.addEventListener("change", () => choose(side, select)); choose(side, select); }
  }
  const ranking = document.getElementById("ranking");
  if (ranking) {
    const pick = () => all(".ranking").forEach((group) => { group.hidden = group.dataset.ranking !== ranking.value; });
    ranking.addEventListener("change", pick);
    pick();
  }

  all(".film").forEach((film) => {
    const input = film.querySelector("input"), steps = input.dataset.steps.split(",");
    input.addEventListener("input", () => {
      all("img", film).forEach((image, i) => image.classList.toggle("shown", i === Number(input.value)));
      film.querySelector("output").textContent = steps[input.value];
      input.setAttribute("aria-valuetext", `${input.dataset.word} ${steps[input.value]}`);
    });
  });

  all(".shell").forEach((shell) => {
    const button = shell.querySelector("button");
    button.addEventListener("click", async () => {
      const text = shell.querySelector("pre").textContent;
      try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }
      catch { getSelection().selectAllChildren(shell.querySelector("pre")); button.textContent = "Selected"; }
    });
  });
  };
  start();
  root.addEventListener("es_trl-new", start);
})();
