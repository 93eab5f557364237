"""Words around numbers, by their effect: articles and units leave a number as it is, others change it."""


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


FUNCTIONS = _set("""
    sqrt log ln sin cos tan exp abs mod base root step question problem part case page chapter section not
    """)
"""Before a number they make it an argument or a label."""
LEADS = _set("""
    the final answer result total is are was equals equal to about approximately approx around roughly nearly almost
    exactly only just a an therefore so thus hence value sum he she it they there minus negative positive of
    """)
"""Before a number they leave it as it is."""
CHANGES = _set("half twice thrice double triple square cube root not than")
"""Before a number, also with "of" or articles between, they make it another one: half of 18, more than 18."""
SHARES = _set("half third thirds quarter quarters fourth fourths fifth fifths eighth tenth percent out")
"""Before "of" they mean a part of the number."""
WHOLES = _set("""
    h hr hrs hour hours m min mins minute minutes week weeks year years day days ft foot feet km kg lb lbs pound pounds
    dollar dollars
    """)
PARTS = _set("""
    m min mins minutes s sec secs seconds in inch inches cm g grams oz ounces cents pence hours days months
    """)
"""Together with WHOLES, units of a quantity with two numbers: 5 hours and 30 minutes."""
SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "lakh": 10**5,
    "crore": 10**7, **dict.fromkeys("百백", 10**2), **dict.fromkeys("千천", 10**3), **dict.fromkeys("万萬만", 10**4),
    **dict.fromkeys("亿億억", 10**8),
}  # fmt: skip
"""After a number they multiply it."""
AMBIGUOUS = _set("""
    k K M B bn mn mln mio dozen dozens score gross half halves third thirds quarter quarters fourth fourths fifth
    fifths sixth sixths eighth eighths tenth tenths hundredth hundredths thousandth thousandths squared cubed point
    choose factorial hundreds thousands millions billions
    """)
"""After a number they change it in ways that are not interpreted."""
ARITHMETIC = {"times", "multiplied", "plus", "minus", "divided", "over", "x", "X", "than", "to", "or", "modulo", "by"}
CLAUSES = _set("""
    in of per for at out with on from by after before every each a an because since as which that is are was were left
    if when while where during under into within among altogether so but the would will
    """)
"""After a number they begin a clause that leaves it as it is."""
LETTERS = set("bcdefghijklmnopqrstuvwxyzBCDEFGHIJKLMNOPQRSTUVWXYZ")
UNIT_LETTERS = set("mgshlLtVAWJNCF")
"""Single letters that may be a unit after a number; others make it a term such as 3x."""
FRACTION_WORDS = {"half", "third", "quarter", "fourth", "fifth", "eighth", "tenth", "some", "change"}
