//! Names that people type.

/// How like a name must be (Jaro-Winkler, 0 to 1) to be meant.
const NEAR: f64 = 0.75;

/// Those of `known` that a misspelt `name` may mean, the likeliest first.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let scored = known.into_iter().map(|k| (strsim::jaro_winkler(name, k), k));
    let mut near: Vec<(f64, &str)> = scored.filter(|(score, _)| *score > NEAR).collect();
    near.sort_by(|a, b| b.0.total_cmp(&a.0));
    near.into_iter().map(|(_, k)| k).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_comes_first_and_the_unlike_not_at_all() {
        let known = ["lora_alpha", "lora_dropout", "seed"];
        assert_eq!(nearest("lora_droput", known), ["lora_dropout", "lora_alpha"]);
        assert!(nearest("zzz", known).is_empty());
    }
}
