// A memory that is pointed at or focused is highlighted wherever it matters, and every item says what it does there.
(function () {
  "use strict";
  var root = document.documentElement;
  var data = JSON.parse(document.getElementById("explanation").textContent);
  var percent = data.unit === "probability";
  var cards = Array.from(document.querySelectorAll(".card"));
  var spots = Array.from(document.querySelectorAll("[data-memory]"));
  var decimals = Number(document.querySelector(".cards").dataset.decimals);
  var shown = null;

  function amount(effect) {
    var text = Math.abs(percent ? 100 * effect : effect).toFixed(decimals);
    var sign = Number(text) === 0 ? "" : effect < 0 ? "−" : "+";
    return sign + text + (percent ? " pp" : "");
  }

  function trace(number) {
    if (number === shown) { return; }
    shown = number;
    spots.forEach(function (spot) { spot.classList.toggle("lit", spot.dataset.memory === number); });
    cards.forEach(function (card, place) {
      var line = card.querySelector(".traced");
      line.textContent = "";
      if (number !== null) {
        var mark = document.createElement("span");
        mark.textContent = "memory " + (Number(number) + 1) + ": " + amount(data.items[place].effects[number]);
        line.appendChild(mark);
      }
    });
  }

  function follow(event) {
    var spot = event.target.closest ? event.target.closest("[data-memory]") : null;
    trace(spot ? spot.dataset.memory : null);
  }

  document.addEventListener("pointerover", follow);
  document.addEventListener("focusin", follow);
  document.addEventListener("focusout", function () { trace(null); });
  root.addEventListener("pointerleave", function () { trace(null); });

  // Paper cannot be unfolded.
  var opened = [];
  window.addEventListener("beforeprint", function () {
    opened = Array.from(document.querySelectorAll("details:not([open])"));
    opened.forEach(function (fold) { fold.open = true; });
  });
  window.addEventListener("afterprint", function () {
    opened.forEach(function (fold) { fold.open = false; });
  });

  root.dataset.ready = "yes";
})();
