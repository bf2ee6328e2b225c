// What the theme leaves out for keyboards and screen readers: wide boxes that scroll can be
// focused, the search dialog has a name, and the buttons of a code block are no landmark.
document.querySelector(".md-search").ariaLabel = "Search";

const sizes = new ResizeObserver((boxes) => {
  for (const { target } of boxes) {
    target.tabIndex = target.scrollWidth > target.clientWidth ? 0 : -1;
  }
});

function complete() {
  for (const nav of document.querySelectorAll(".md-code__nav")) nav.role = "none";
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .highlight-ipynb")) {
    sizes.observe(box);
  }
}

complete();
new MutationObserver(complete).observe(document.body, { childList: true, subtree: true });
