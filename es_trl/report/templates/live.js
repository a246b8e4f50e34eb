(() => {
  "use strict";
  // Asks every two seconds whether the run has left something new, and shows it where the reader is.
  const stop = () => {
    const button = document.querySelector("[data-stop]");
    if (button) button.addEventListener("click", async () => {
      button.disabled = true;
      const answer = await fetch("stop", { method: "POST" }).catch(() => null);
      button.textContent = answer && answer.ok ? "Stopping after this micro-batch" : "There is nothing to stop";
    });
  };
  stop();
  let known = null, gone = 0;
  setInterval(async () => {
    const answer = await fetch("version", { cache: "no-store" }).catch(() => null);
    if (!answer || !answer.ok) {
      gone += 1;
      const said = document.querySelector("[data-live] b");
      if (gone > 2 && said) said.textContent = "No longer served: the page of a finished run is its report/index.html";
      return;
    }
    gone = 0;
    const version = await answer.text();
    if (known !== null && known !== version) {
      const page = await fetch(".", { cache: "no-store" });
      if (!page.ok) return;
      const found = new DOMParser().parseFromString(await page.text(), "text/html");
      document.getElementById("main").replaceChildren(...found.getElementById("main").childNodes);
      document.documentElement.dispatchEvent(new Event("es_trl-new"));
      stop();
    }
    known = version;
  }, 2000);
})();
