"""One folder for each method, named after its public class."""
