
// Sliders: an input of type range lies over each pair, so that mouse, finger and keyboard all move it.
for (const input of document.querySelectorAll(".slider input")) {
  input.addEventListener("input", () => input.parentElement.style.setProperty("--split", `${input.value}%`));
}
