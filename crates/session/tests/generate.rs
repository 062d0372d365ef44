//! One answer beside other requests of the same engine.

use lathe_session::{Catalogue, Environment, Generation, Need, Options, SamplingChoice};
use lathe_session::{SessionError, Silent, decoder, encode_raw, generate, open};

/// The answer to "A fox", with `others` waiting in the engine before it.
fn answer(others: &[&str]) -> Result<Generation, SessionError> {
    let catalogue = Catalogue { environment: &Environment::from_process(), reporter: &Silent };
    let opened = open(&catalogue, "tiny", &Default::default())?;
    let need = Need { context: 128, sequences: 4, rows_max: None };
    let (mut engine, model) = opened.prepare(&Options::default(), need)?.into_engine(true, 4)?;
    let choice = SamplingChoice { max_tokens: Some(12), ignore_eos: true, ..Default::default() };
    let request = |text| -> Result<_, SessionError> {
        Ok(choice.request(encode_raw(&model, text)?, &model.generation))
    };
    for other in others {
        engine.add(request(other)?, None)?;
    }
    let tokenizer = model.tokenizer.as_ref().expect("tiny has a tokenizer");
    let mut shown = String::new();
    let show = |text: &str| -> Result<(), SessionError> {
        shown.push_str(text);
        Ok(())
    };
    let own = request("A fox")?;
    let generation = generate(&mut engine, own, Some(decoder(tokenizer)), || false, show)?;
    assert_eq!(shown, generation.text);
    Ok(generation)
}

#[test]
fn other_requests_do_not_get_into_an_answer() {
    let alone = answer(&[]).expect("an answer");
    let beside = answer(&["The sea", "Once upon a time there was"]).expect("an answer");
    assert_eq!(alone.tokens.len(), 12);
    assert_eq!((alone.tokens, alone.text), (beside.tokens, beside.text));
}
