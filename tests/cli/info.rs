//! `halfbyte info`.

use crate::halfbyte;

#[test]
fn says_which_backend_and_why() {
    let run = halfbyte(["info"]);
    let text = run.ok();
    assert!(text.contains(env!("CARGO_PKG_VERSION")), "{text}");
    for part in ["CPU", "threads", "memory", "driver", "GPU", "backend"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn prints_one_json_object() {
    let facts = halfbyte(["info", "--json"]).json();
    assert_eq!(facts["version"], env!("CARGO_PKG_VERSION"));
    assert!(["cpu", "cuda"].contains(&facts["backend"]["picked"].as_str().unwrap_or_default()));
    assert!(facts["backend"]["why"].as_str().is_some_and(|s| !s.is_empty()));
    assert!(facts["cpu"]["threads"].as_u64().is_some_and(|n| n > 0));
    assert!(facts["cuda"]["devices"].is_array());
}
