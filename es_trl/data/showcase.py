"""Eight prompts to look at: characters, text, counts, a place and styles."""

# The project that this one began with shows eight pictures on such subjects. It has no licence, so the words are ours.
SHOWCASE = (
    "a cyberpunk rabbit in a neon-lit alley, rain on its jacket",
    "a cowboy made of spaghetti riding across a plate at sunset",
    "Tokyo harbour at night as 16-bit pixel art",
    "a Victorian family portrait with a polite brass robot",
    "a wooden sign that says 'OPEN' above the door of a small bakery",
    "three red apples and one green pear on a blue table",
    "a lighthouse on a cliff in a storm, oil painting",
    "macro photograph of a dragonfly with dew on its wings",
)
