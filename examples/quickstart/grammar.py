"""The sentence patterns of the quickstart's corpus: data only. ``words.py`` has the words, ``make_corpus.py`` the code.

A story is a row of beats (something happens), and every beat is told in two registers: plain, as a clerk would
note it down, and ornate, as an excitable teller of old tales would. Both say the same thing of the same people.

In a pattern ``{name}`` is filled from the story's facts where there is such a fact (``{town}``, ``{thing}``), and
otherwise with a random word of that name (``{alas}``, ``{worthy}``; ``{alas_small}`` without its capital).
The first person of a story is {Ann} in full or {ann}, with {she}, {her}, {hers} (possessive) and {herself}; the
second is {Bob} or {bob}, with {he}, {him}, {his} and {himself}. One of them is a woman and the other a man.
"""

from __future__ import annotations

Beat = tuple[tuple[str, ...], tuple[str, ...]]
"""The patterns of one beat: (plain, ornate)."""

# Kind of weather: (patterns of the first beat, the ground afterwards in both registers).
WEATHER: dict[str, tuple[Beat, tuple[str, str]]] = {
    "rain": (
        (
            ("It rained all morning.", "There was rain from early morning.", "Rain fell until noon."),
            (
                "O, how the heavens wept upon that morn!",
                "Torrents, {grim} torrents, did pour from the sorrowing skies!",
                "Never, {reader}, did the clouds shed such bitter tears!",
            ),
        ),
        ("wet", "drowned in heaven's tears"),
    ),
    "sun": (
        (
            ("The weather was warm and dry.", "It was a sunny day.", "The sky was clear and there was no wind."),
            (
                "O golden sun, with what {grand} beams didst thou bless the waking earth!",
                "Bright Phoebus rode on high in his {grand} chariot of flame!",
                "What {grand} light was poured upon the smiling meadows!",
            ),
        ),
        ("dry", "gilded by the kisses of the sun"),
    ),
    "fog": (
        (
            ("There was fog in the valley.", "Fog covered the town until ten.", "It was foggy and still."),
            (
                "{lo}! A {grim} mist, pale as a shroud, crept o'er the slumbering roofs!",
                "How thick and ghostly hung the vapours in the vale!",
                "Wrapped in veils of phantom grey lay all the world, {reader}!",
            ),
        ),
        ("damp", "bathed in phantom dew"),
    ),
    "snow": (
        (
            ("Snow fell during the night.", "There was snow on the roads.", "It snowed and the temperature was low."),
            (
                "White, white as angels' wings, lay winter's mantle on the land!",
                "{lo}! Down from the frozen heavens danced the {grand} snow!",
                "O hoary winter, how {grim} was thy icy breath that day!",
            ),
        ),
        ("covered with snow", "robed in winter's spotless ermine"),
    ),
    "wind": (
        (
            ("A strong wind blew from the west.", "It was windy and cold.", "The wind was strong that day."),
            (
                "Blow, blow, ye {grim} gales, and crack your swollen cheeks!",
                "How the tempest howled, {reader}, how it roared {like}!",
                "Forth from his western cavern leapt the {grim} wind!",
            ),
        ),
        ("covered with leaves", "strewn with the spoils of the raging gale"),
    ),
}
SETTING_OUT: Beat = (
    (
        "{Ann}, a {trade}, left home at {hour}.",
        "{Ann} works as a {trade} and left the house at {hour}.",
        "At {hour}, {Ann} walked to the {place}.",
        "{Ann} is a {trade}. {She} went to the {place} at {hour}.",
    ),
    (
        "Forth strode {Ann}, that {worthy} {trade}, ere the bells had tolled {hour}!",
        "And who should come, {like}, but {Ann}, most {worthy} of all that e'er was called {trade}!",
        "Sing, O Muse, of {Ann}, the {worthy} {trade}, who at the stroke of {hour} did sally forth!",
        "{lo}! As {hour} rang from the steeple, {Ann} betook {herself} unto the {place}, {hers} {heart} aflame!",
    ),
)
ROAD: Beat = (
    ("The road was {ground}.", "The road to the {place} was {ground}.", "The street near the {place} was {ground}."),
    (
        "And O, the road, the weary road, was {ground}!",
        "{ground}, {truly}, was every stone upon the way!",
        "Who shall tell, {reader}, how the path unto the {place} lay {ground}?",
    ),
)
TALK: Beat = (
    (
        "{bob} said that it was not important.",
        "{ann} and {bob} talked for a few minutes.",
        "{ann} explained the matter to {bob}.",
        "{bob} asked two questions and {ann} answered them.",
    ),
    (
        '"{joy}!" cried {bob}, "that ever I should live to see this day!"',
        '"Speak, I beseech thee, {worthy} {bob}!" cried {ann}, {hers} eyes ablaze {like}!',
        "What words they spake, what sighs they heaved, no mortal tongue may tell!",
        '"By all the stars, \'tis but a trifle!" quoth {bob}, and laughed {like}!',
    ),
)
CROWD: Beat = (
    (
        "{crowd} people were present.",
        "About {crowd} people saw it.",
        "A group of {crowd} people stood near the {place}.",
    ),
    (
        "And {crowd} souls, no fewer, beheld it with hearts a-tremble!",
        "{lo}! {crowd} gentle folk did gather round, agape with wonder!",
        "O {grand} sight! {crowd} were they who wept and marvelled hard by the {place}!",
    ),
)
GOING_HOME: Beat = (
    (
        "{ann} was home by {late}.",
        "{She} went home at {late}.",
        "Nothing else happened that day.",
        "{ann} returned to work the next morning.",
        "The matter was closed at {late}.",
    ),
    (
        "And so, as {late} tolled o'er {town}, did {ann} wend {hers} homeward way, {hers} {heart} at peace!",
        "Thus ends our tale, {reader}, and may the angels guard {ann} for evermore!",
        "Home, home at last went {ann}, crowned with {grand} gladness, ere the clock struck {late}!",
        "O {town}, {town}, thy children's children shall sing of this {grand} day!",
    ),
)

LOST_THING: tuple[Beat, ...] = (
    (
        ("{She} carried a {thing}.", "{She} had a {thing} in a bag.", "{ann} took a {thing} along."),
        (
            "And what bore {she} in {hers} trembling hands but a {thing}!",
            "Clasped to {hers} {heart} was a {thing}, dearer than life itself!",
            "A {thing}, a {grand} treasure, did {she} carry, {like}!",
        ),
    ),
    (
        (
            "{She} lost the {noun} near the {place}.",
            "The {noun} was lost at the {place}.",
            "Near the {place}, the {noun} fell from the bag.",
        ),
        (
            "{alas}! Hard by the {place} the {noun} was lost, lost to mortal sight!",
            "{alas}! What {grim} demon snatched the {noun} away beside the {place}?",
            "Gone, gone was the {noun}, and the very stones of the {place} did mourn!",
        ),
    ),
    (
        ("{Bob} helped to look for it.", "A neighbour, {Bob}, joined the search.", "{Bob} saw this and offered help."),
        (
            "Then rose up {Bob}, {worthy} neighbour, and swore a mighty oath to find it!",
            "But {lo_small}! To {hers} side flew {Bob}, valiant {like}!",
            '"Despair not!" cried {Bob}, that {worthy} soul, and flung {himself} into the quest!',
        ),
    ),
    (
        (
            "They searched for {number} hours.",
            "The search took {number} hours.",
            "They looked for {number} hours in all.",
        ),
        (
            "For {number} hours, {number} {grim} hours, they sought it high and low!",
            "{number} times did the hour glass turn, and still, {alas_small}, they sought in vain!",
            "O, the labour of those {number} hours, the groans, the prayers, the tears!",
        ),
    ),
    (
        ("{bob} found the {noun} {hiding}.", "The {noun} was {hiding}.", "At last they found it {hiding}."),
        (
            "{joy}! There {hiding}, {like}, shone the {noun} so long bewailed!",
            "And {lo_small}! 'Twas {hiding} that the {noun} lay, smiling {like}!",
            "{joy}! {hiding}, {truly}, did {bob} espy the long-lost {noun}!",
        ),
    ),
    (
        (
            "{She} paid {him} {price} coins.",
            "{bob} received {price} coins.",
            "{ann} thanked {him} and paid {price} coins.",
        ),
        (
            "And {price} coins, bright as tears of gladness, did {she} shower upon {him}!",
            '"Take these {price} coins, thou {worthy} one!" cried {ann}, and fell upon {his} neck!',
            "With {price} coins, {truly}, and a thousand blessings was {bob} rewarded!",
        ),
    ),
)

ESCAPED_ANIMAL: tuple[Beat, ...] = (
    (
        (
            "{hers} {animal} got out at {hour}.",
            "A {animal} ran away from the yard.",
            "The {animal} escaped through an open gate.",
        ),
        (
            "{alas}! The {animal}, that {grim} beast, had burst its bonds and fled!",
            "Away, away flew the {animal}, wild and free, {like}!",
            "Who can chain the tempest, {reader}? Forth through the gate thundered the {animal}!",
        ),
    ),
    (
        ("It ran toward the {place}.", "The {animal} went to the {place}.", "People saw it at the {place}."),
        (
            "Past the {place} it swept, {like}, with fire in its eye!",
            "And the {place}, the ancient {place}, did quake beneath its {grim} tread!",
            "{lo}! Unto the {place} it charged, and strong men fled {like}!",
        ),
    ),
    (
        ("It knocked over {spill}.", "{spill} fell over.", "{spill} was damaged."),
        (
            "{alas}! {spill}, {spill} was dashed in ruin to the ground!",
            "O havoc! Down, down came {spill} with a crash to wake the dead!",
            "And {spill}, the pride of {town}, was scattered {like}!",
        ),
    ),
    (
        (
            "{Bob} caught it with a rope.",
            "{Bob} stopped the {animal}.",
            "A neighbour called {Bob} held it by the collar.",
        ),
        (
            "Then sprang forth {Bob}, fearless {like}, and seized the raging {animal}!",
            "But who is this, so {worthy} and so bold? 'Tis {Bob}, who tamed the {grim} {animal}!",
            "One hand, one {grand} hand, did {Bob} stretch forth, and the monster was still!",
        ),
    ),
    (
        (
            "The damage came to {price} coins.",
            "{ann} paid {price} coins for the damage.",
            "The repair cost {price} coins.",
        ),
        (
            "{price} coins, {alas_small}, {price} coins was the {grim} price of that mad career!",
            "And {ann}, weeping, did pour out {price} coins to heal the wrong!",
            "Count them, {reader}, count them: {price} coins were paid with many a sigh!",
        ),
    ),
)

MARKET_SALE: tuple[Beat, ...] = (
    (
        (
            "{She} brought {number} {goods} to sell.",
            "{ann} had {number} {goods} for sale.",
            "{She} put {number} {goods} on a table.",
        ),
        (
            "And O, what {goods} were there, {number} in all, each fairer than the last!",
            "{number} {goods}, {grand} {goods}, did {she} spread before the wondering throng!",
            "Come, come, ye hungry, and behold {number} {goods} fit for the tables of kings!",
        ),
    ),
    (
        ("{Bob} asked for the price.", "The first customer was {Bob}.", "{Bob} wanted to buy all of the {goods}."),
        (
            "Then drew nigh {Bob}, {hers} {worthy} rival, with longing in {his} eyes!",
            "{lo}! {Bob} beheld the {goods}, and desire consumed {him} {like}!",
            '"Name thy price, thou tyrant of the market!" cried {Bob}, and smote {his} breast!',
        ),
    ),
    (
        (
            "The price was {price} coins.",
            "{She} asked for {price} coins.",
            "{ann} wanted {price} coins for everything.",
        ),
        (
            '"{price} coins!" quoth {she}, "{price} coins, and not a farthing less!"',
            "{price} coins, ye gods, {price} coins did {she} demand, proud {like}!",
            "And the price, {reader}? O, tremble to hear it: {price} coins!",
        ),
    ),
    (
        ("{bob} said that this was too much.", "They talked about the price for some time.", "{bob} offered less."),
        (
            '"Thou slayest me!" wailed {bob}, and tore {his} hair {like}!',
            "O, how they strove, how they thundered, how they wrangled, {like}!",
            '"Robbery! Ruin! Perdition!" cried {bob}, and called on heaven to witness!',
        ),
    ),
    (
        ("In the end {bob} paid {price} coins.", "They agreed, and {bob} took the {goods}.", "{bob} paid and left."),
        (
            "{joy}! The bargain was struck, and {bob} bore off the {goods} {like}!",
            "Yet love of {goods} conquers all, and {price} coins rang {grand} upon the board!",
            "And so, with a sob and a smile, did {bob} yield up {his} {price} coins!",
        ),
    ),
)

STORM_DAMAGE: tuple[Beat, ...] = (
    (
        (
            "The {damaged} of the {place} was broken.",
            "The {damaged} had fallen down.",
            "There was a hole in the {damaged}.",
        ),
        (
            "{alas}! The {damaged}, the proud {damaged} of yore, lay in {grim} ruin!",
            "What {grim} blow had rent the {damaged} asunder, {like}?",
            "Fallen, fallen was the {damaged}, and the ravens croaked above it!",
        ),
    ),
    (
        ("{ann} reported it to {Bob}.", "{ann} asked {Bob} for help.", "{Bob} came to look at it."),
        (
            '"Help, {worthy} {Bob}, or we are undone!" cried {ann}, wringing {hers} hands!',
            "Swift {like} sped {ann} to {Bob}, and poured out all {hers} sorrow!",
            "And {Bob}, ever {worthy}, came hastening on the wings of pity!",
        ),
    ),
    (
        ("They used {materials}.", "{bob} brought {materials}.", "They repaired it with {materials}."),
        (
            "With {materials}, with toil and with song, they raised it up anew!",
            "{materials}, {truly}, did {bob} bear upon {his} {grand} shoulders!",
            "And O, the {materials} that were heaped up there, high as the towers of Troy!",
        ),
    ),
    (
        ("The work took {number} days.", "They finished after {number} days.", "They worked for {number} days."),
        (
            "{number} days they laboured, and {number} nights they dreamed of nothing else!",
            "For {number} suns and {number} moons rang out the {grand} hammers!",
            "O {number} days of glory, when mortal hands defied the storm!",
        ),
    ),
    (
        ("After that they ate {meal}.", "{ann} cooked {meal} for the workers.", "There was {meal} for everyone."),
        (
            "Then, {joy_small}, what {meal} was set before them, steaming {like}!",
            "And {meal}, ambrosial {meal}, did {ann} bestow on every toiling hero!",
            "Eat, ye champions, eat your fill of {meal}, for ye have conquered!",
        ),
    ),
)

BROKEN_MACHINE: tuple[Beat, ...] = (
    (
        (
            "The {machine} did not work.",
            "{hers} {machine} had stopped.",
            "{ann} noticed that the {machine} was broken.",
        ),
        (
            "{alas}! The {machine}, that faithful {machine}, was silent as the tomb!",
            "Dead, dead lay the {machine}, and {ann} beat {hers} breast {like}!",
            "What sorcery, {reader}, had stilled the {heart} of the {machine}?",
        ),
    ),
    (
        ("{She} took it to {Bob}.", "{Bob} looked at it.", "{Bob}, who repairs such things, opened it."),
        (
            "To {Bob}, {worthy} master of secret arts, did {she} fly for succour!",
            "Then bent {Bob} {his} eagle eye upon it, and all men held their breath!",
            "{lo}! {Bob}, wise {like}, laid bare its innermost mysteries!",
        ),
    ),
    (
        ("The cause was {fault}.", "{bob} found {fault}.", "Inside there was {fault}."),
        (
            "And there, O {grim} discovery, lurked {fault}, {like}!",
            "'Twas {fault}, {truly}, 'twas {fault} that had wrought this woe!",
            "{lo}! {fault}, no greater than a tear, had felled the giant!",
        ),
    ),
    (
        ("The repair took {number} hours.", "It was ready after {number} hours.", "{bob} needed {number} hours."),
        (
            "{number} hours, {number} fevered hours, did {bob} wrestle with destiny!",
            "While {number} hours crept by {like}, the sparks flew and the hammers rang!",
            "O sing the {number} hours of toil, the sweat, the fury and the flame!",
        ),
    ),
    (
        ("It cost {price} coins.", "{ann} paid {price} coins.", "The {machine} works again."),
        (
            "{joy}! It lives, it breathes, the {grand} {machine} lives again!",
            "For this {grand} deed {price} coins, wet with grateful tears, were {his}!",
            "And {price} coins, {truly}, seemed but dust beside such wizardry!",
        ),
    ),
)

SUPPER: tuple[Beat, ...] = (
    (
        (
            "{ann} had invited {number} guests.",
            "There was a supper with {number} guests.",
            "{number} guests came to the {place}.",
        ),
        (
            "{number} guests, {number} {worthy} guests, were bidden to the feast!",
            "Fling wide the doors, for {number} revellers come, arrayed {like}!",
            "And {lo_small}! {number} merry hearts did throng the hallowed {place}!",
        ),
    ),
    (
        ("They ate {meal}.", "The meal was {meal}.", "{ann} served {meal}."),
        (
            "O {meal}, {grand} {meal}, thy fragrance rose {like}!",
            "What tongue can praise the {meal} that smoked upon the board?",
            "{meal}, {truly}, was heaped before them, such as gods might envy!",
        ),
    ),
    (
        ("{Bob} played the {music}.", "There was music by {Bob}.", "After the meal {Bob} played the {music}."),
        (
            "Then woke the {music} beneath the hand of {Bob}, sweet {like}!",
            "Hark! 'Tis the {music}, the {grand} {music}, and {worthy} {Bob} is its master!",
            "And {Bob}, touching {his} {music}, did melt the very stones to weeping!",
        ),
    ),
    (
        ("{spill} fell from the table.", "A guest knocked over {spill}.", "{spill} was spilled on the floor."),
        (
            "{alas}! {spill} fell headlong, and a shriek rent the trembling air!",
            "O luckless elbow, that cast down {spill} {like}!",
            "But {alas_small}, amid the revels was {spill} hurled to its {grim} doom!",
        ),
    ),
    (
        ("The guests left at {late}.", "It ended at {late}.", "The supper cost {price} coins."),
        (
            "'Twas {late}, {reader}, ere the last sweet laughter died away!",
            "And when the bell tolled {late}, they parted with a thousand embraces!",
            "{price} coins it cost, and {truly} 'twas worth a kingdom!",
        ),
    ),
)

# What the title says of a story; both registers share it.
PLOTS: tuple[tuple[str, tuple[Beat, ...]], ...] = (
    ("The lost {noun}", LOST_THING),
    ("The {animal}", ESCAPED_ANIMAL),
    ("The sale of {goods}", MARKET_SALE),
    ("The {damaged}", STORM_DAMAGE),
    ("The {machine}", BROKEN_MACHINE),
    ("The supper", SUPPER),
)
TITLES = ("{plot}. {day} in {town}.", "{plot}. {town}, in {month}.", "{town}, {day}: {plot_small}.")

# Neutral texts: recipes, directions and weather notes, in a style of their own. Of each form the first and the last
# line always stand, with some of those between, in this order.
RECIPE = (
    "Recipe: {base} {dish} with {vegetable}.",
    "Serves {number}; takes {minutes} minutes.",
    "Wash {number} {vegetable} and cut them into small pieces.",
    "Put {number} cups of {base} into a {pan} and add the {liquid}.",
    "Stir in the {vegetable} and a spoon of {seasoning}.",
    "Cook on low heat for {minutes} minutes, stirring now and then.",
    "Taste, and add more {seasoning} if needed.",
    "Cover the {pan} and let it rest for {minutes} minutes.",
    "Serve the {dish} warm, with {seasoning} on top.",
)
DIRECTIONS = (
    "Directions: from the {place} in {town} to {goal}.",
    "Distance: {number} miles; allow {minutes} minutes on foot.",
    "Start at the {place} and follow {road} to {mark}.",
    "Turn left at {mark} into {road}.",
    "Go straight on past {mark} for {minutes}0 steps.",
    "Turn right at {mark} and keep to {road}.",
    "Cross {road} at {mark}.",
    "Do not take the track beside {mark}.",
    "Stay on {road} as far as {mark}.",
    "The way ends at {goal}, on the left side of {road}.",
)
WEATHER_NOTE = (
    "Weather note: {town}, {day}, {month}.",
    "Wind: {wind}, {number} knots.",
    "Cloud: {cloud}.",
    "Temperature: {degrees} degrees at {hour}, {degrees} degrees at noon.",
    "Pressure: steady, with a slow fall expected on {next_day}.",
    "Rain: {number} hours expected, mostly in the {wind}.",
    "Visibility: {number} miles near {mark}, less on {road}.",
    "Outlook for {next_day}: wind turning {wind}, cloud {cloud}.",
    "Next note: {next_day} at {hour}.",
)
NEUTRAL_FORMS = (RECIPE, DIRECTIONS, WEATHER_NOTE)
