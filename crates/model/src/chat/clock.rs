//! `strftime_now` of chat templates: the local date, as Python spells it in the locale "C".

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A moment, split as the calendar splits it.
struct Moment {
    year: i64,
    /// From 0.
    month: usize,
    /// From 1.
    day: i64,
    /// From 0, Sunday.
    weekday: usize,
    /// From 1.
    day_of_year: i64,
    second_of_day: i64,
    microsecond: u32,
    /// Seconds since 1970 in universal time.
    unix_seconds: i64,
}

impl Moment {
    /// Civil date of a Unix time (H. Hinnant, "chrono-compatible low-level date algorithms").
    /// `offset` is how many seconds the local clock is ahead.
    fn new(unix_seconds: i64, offset: i64, microsecond: u32) -> Self {
        let local_seconds = unix_seconds + offset;
        let days = local_seconds.div_euclid(86_400);
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        // Years that begin in March, so that the leap day is the last.
        let day_of_march_year =
            day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_march_year + 2) / 153;
        let day = day_of_march_year - (153 * march_month + 2) / 5 + 1;
        let month = (march_month + 2) % 12;
        let year = year_of_era + era * 400 + i64::from(month < 2);
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let before_month = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][month as usize];
        Self {
            year,
            month: month as usize,
            day,
            weekday: (days + 4).rem_euclid(7) as usize,
            day_of_year: before_month + day + i64::from(leap && month > 1),
            second_of_day: local_seconds.rem_euclid(86_400),
            microsecond,
            unix_seconds,
        }
    }

    /// Year and week of ISO 8601: weeks begin on Monday, the first has the first Thursday.
    fn iso_week(&self) -> (i64, i64) {
        let monday_based = (self.weekday as i64 + 6) % 7;
        let week = (self.day_of_year - monday_based + 9) / 7;
        let weeks = |year: i64| {
            let last = |year: i64| {
                (year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400)) % 7
            };
            52 + i64::from(last(year) == 4 || last(year - 1) == 3)
        };
        if week < 1 {
            (self.year - 1, weeks(self.year - 1))
        } else if week > weeks(self.year) {
            (self.year + 1, 1)
        } else {
            (self.year, week)
        }
    }

    /// The text of one directive; `None` if it is not known.
    fn directive(&self, directive: char) -> Option<String> {
        let (hour, minute) = (self.second_of_day / 3600, self.second_of_day / 60 % 60);
        let twelve = (hour + 11) % 12 + 1;
        let (day, month) = (DAYS[self.weekday], MONTHS[self.month]);
        let iso = self.iso_week();
        let weeks_from = |first: i64| (self.day_of_year - 1 + 7 - first) / 7;
        Some(match directive {
            'Y' => self.year.to_string(),
            'C' => format!("{:02}", self.year.div_euclid(100)),
            'y' => format!("{:02}", self.year.rem_euclid(100)),
            'G' => iso.0.to_string(),
            'g' => format!("{:02}", iso.0.rem_euclid(100)),
            'V' => format!("{:02}", iso.1),
            'U' => format!("{:02}", weeks_from(self.weekday as i64)),
            'W' => format!("{:02}", weeks_from((self.weekday as i64 + 6) % 7)),
            'm' => format!("{:02}", self.month + 1),
            'B' => month.into(),
            'b' | 'h' => month[..3].into(),
            'd' => format!("{:02}", self.day),
            'e' => format!("{:2}", self.day),
            'j' => format!("{:03}", self.day_of_year),
            'A' => day.into(),
            'a' => day[..3].into(),
            'w' => self.weekday.to_string(),
            'u' => ((self.weekday + 6) % 7 + 1).to_string(),
            'H' => format!("{hour:02}"),
            'k' => format!("{hour:2}"),
            'I' => format!("{twelve:02}"),
            'l' => format!("{twelve:2}"),
            'p' => if hour < 12 { "AM" } else { "PM" }.into(),
            'P' => if hour < 12 { "am" } else { "pm" }.into(),
            'M' => format!("{minute:02}"),
            'S' => format!("{:02}", self.second_of_day % 60),
            'f' => format!("{:06}", self.microsecond),
            's' => self.unix_seconds.to_string(),
            // Python's moment knows no zone.
            'z' | 'Z' => String::new(),
            'c' => self.format("%a %b %e %H:%M:%S %Y"),
            'x' | 'D' => self.format("%m/%d/%y"),
            'X' | 'T' => self.format("%H:%M:%S"),
            'r' => self.format("%I:%M:%S %p"),
            'R' => self.format("%H:%M"),
            'F' => self.format("%Y-%m-%d"),
            'n' => "\n".into(),
            't' => "\t".into(),
            '%' => "%".into(),
            _ => return None,
        })
    }

    /// The text of `format`. Unknown directives stay as they are. Between `%` and the letter may
    /// be glibc's flags: `-` drops padding, `_` pads with spaces, `0` with zeros, `^` makes upper
    /// case, `#` the other case.
    fn format(&self, format: &str) -> String {
        let mut text = String::new();
        let mut rest = format;
        while let Some(at) = rest.find('%') {
            text.push_str(&rest[..at]);
            rest = &rest[at..];
            let letters = rest[1..].trim_start_matches(['-', '_', '0', '^', '#']);
            let flags = &rest[1..rest.len() - letters.len()];
            let letter = letters.trim_start_matches(['E', 'O']).chars().next();
            let Some((letter, field)) =
                letter.and_then(|letter| Some((letter, self.directive(letter)?)))
            else {
                text.push('%');
                rest = &rest[1..];
                continue;
            };
            text.push_str(&with_flags(field, letter, flags));
            let modifiers = letters.len() - letters.trim_start_matches(['E', 'O']).len();
            rest = &letters[modifiers + letter.len_utf8()..];
        }
        text + rest
    }
}

fn with_flags(field: String, letter: char, flags: &str) -> String {
    let digits = field.trim_start_matches(['0', ' ']);
    let digits = if digits.is_empty() { "0" } else { digits };
    let numeric = !field.is_empty() && field.trim_start().bytes().all(|b| b.is_ascii_digit());
    let padding = field.len().saturating_sub(digits.len());
    flags.chars().fold(field.clone(), |field, flag| match flag {
        '-' if numeric => digits.to_owned(),
        '_' if numeric => " ".repeat(padding) + digits,
        '0' if numeric => "0".repeat(padding) + digits,
        '^' => field.to_uppercase(),
        '#' if letter == 'p' => field.to_lowercase(),
        '#' => field.to_uppercase(),
        _ => field,
    })
}

/// The present moment by `format`, on the local clock.
pub(super) fn strftime_now(format: &str) -> String {
    let now = jiff::Zoned::now();
    let (moment, offset) = (now.timestamp(), i64::from(now.offset().seconds()));
    let microsecond = moment.subsec_microsecond().unsigned_abs();
    Moment::new(moment.as_second(), offset, microsecond).format(format)
}

#[cfg(test)]
mod tests {
    use super::Moment;

    fn strftime(format: &str, unix_seconds: i64) -> String {
        Moment::new(unix_seconds, 0, 0).format(format)
    }

    // Expected values are Python's datetime.fromtimestamp(t, timezone.utc).strftime(format).
    #[test]
    fn equals_python() {
        assert_eq!(strftime("%d %b %Y", 1_721_952_000), "26 Jul 2024");
        assert_eq!(strftime("%Y-%m-%d %H:%M:%S", 0), "1970-01-01 00:00:00");
        assert_eq!(
            strftime("%A, %B %d, %Y (%j)", 1_709_208_000),
            "Thursday, February 29, 2024 (060)"
        );
        assert_eq!(strftime("%-d/%-m %I %p 100%% %Q", 1_735_689_599), "31/12 11 PM 100% %Q");
        assert_eq!(strftime("%F %T", 951_827_696), "2000-02-29 12:34:56");
    }
}
