"""One set of colours for every picture, told apart by colour-blind readers too: Okabe and Ito, 2008."""

BLACK, ORANGE, SKY, GREEN, YELLOW = "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#999999"

# What is on both sides of every comparison.
PLAIN, OURS = BLUE, VERMILLION
# Plain training at as much compute as ours.
SHORT, SMALL = SKY, GREEN
